"""What must be settled before JAX is imported: it reads the allocator's settings at its start."""

import glob
import os
import sys

_ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/accel*", "/dev/vfio/[0-9]*", "/dev/kfd")

# XLA's CPU temporaries are mapped and unmapped at every call; kept in one arena instead, attention
# at batch 16 and context 200 went from 76 to 36 ms. glibc reads this at process start only.
_MALLOC = {
    "glibc.malloc.mmap_max": "0",
    "glibc.malloc.trim_threshold": str(16 << 30),
    "glibc.malloc.top_pad": str(256 << 20),
    "glibc.malloc.arena_max": "1",
}


def on_cpu() -> bool:
    """Whether JAX will run on the CPU, told without starting it."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    return platforms == "cpu" or not (platforms or any(map(glob.glob, _ACCELERATORS)))


def tune_malloc() -> None:
    """Starts this process anew with glibc's allocator set for XLA on CPU, unless it is already."""
    if not on_cpu() or not sys.platform.startswith("linux") or os.environ.get("GLIBC_TUNABLES"):
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(f"{name}={value}" for name, value in _MALLOC.items())
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
