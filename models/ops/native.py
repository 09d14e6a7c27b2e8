"""Paged attention and products with weights for CPU in C++, as XLA custom calls.

The attention writes the pool's pages where they are. The products take packed weights, in which
what a thread reads lies together; XLA rearranges a weight at every step of more than one row. Other
dtypes than float32, head dims and page sizes that are no multiple of 4 are left to XLA
(`models.ops.attention_cpu`).

The code is compiled for the machine at hand when it is first asked for, by the C++ compiler found
there, which takes some seconds; the library is kept in a folder of the caller's choice.

Dimension letters as in `models.ops.attention`, and I inputs, O outputs, J panels, Z columns of one.
"""

import ctypes
import hashlib
import math
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from models.kv_cache import LayerCache, StepInput
from models.ops import attention_cpu
from models.ops.linear import linear as xla_linear

_SOURCE = Path(__file__).with_suffix(".cc")
_TARGETS = {"kairos_paged_attention": "PagedAttention", "kairos_linear": "Linear"}
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-w")


_library: ctypes.CDLL | None = None


class NotAvailable(RuntimeError):
    """The custom calls cannot be had here; the message says why."""


def load(folder: Path) -> None:
    """Compiles the code, unless `folder` has it already, and registers it with XLA. Once a process:
    later calls do nothing.

    Raises:
        NotAvailable: there is no C++ compiler, or it failed.
    """
    global _library
    if _library is not None:
        return
    name = os.environ.get("CXX", "c++")
    compiler = shutil.which(name)
    if compiler is None:
        raise NotAvailable(f"there is no C++ compiler {name!r}; $CXX names another")
    path = folder / f"native-{_key(compiler)}.so"
    if not path.exists():
        _compile(compiler, path)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise NotAvailable(f"{path} cannot be loaded: {error}") from error
    for target, symbol in _TARGETS.items():
        handler = jax.ffi.pycapsule(getattr(library, symbol))
        jax.ffi.register_ffi_target(target, handler, platform="cpu")
    _library = library


def takes(dtype: DTypeLike, head_dim: int, page_size: int) -> bool:
    """Whether the attention in C++ takes such arrays. It reads each sequence's pages up to
    its own length.
    """
    return jnp.dtype(dtype) == jnp.float32 and not head_dim % 4 and not page_size % 4


def attention(
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    layer: LayerCache,
    step: StepInput,
) -> tuple[Float[Array, "T N H"], LayerCache]:
    """Appends k and v to the layer's pages and attends. See `models.ops.attention.Attention`.

    `load` must have been called.
    """
    head, page = layer.k.shape[2:]
    if q.dtype != layer.k.dtype or not takes(layer.k.dtype, head, page):
        return attention_cpu.attention(q, k, v, layer, step)
    shapes = [jax.ShapeDtypeStruct(each.shape, each.dtype) for each in (q, layer.k, layer.v)]
    call = jax.ffi.ffi_call("kairos_paged_attention", shapes, input_output_aliases={3: 1, 4: 2})
    numbers = step.slots, step.starts, step.contexts, step.pages
    out, keys, values = call(q, k, v, layer.k, layer.v, *numbers)
    return out, LayerCache(keys, values)


def linear(
    x: Float[Array, "... I"],
    w: Float[Array, "J I Z"],
    *out: int,
    dtype: DTypeLike | None = None,
    rows: Any = None,
) -> Float[Array, "..."]:
    """See `models.ops.linear.Linear`; w is as `pack` gave it. Rows that are not wanted are not
    computed: they are zeros.
    """
    if w.dtype != jnp.float32:
        return xla_linear(x, w, *out, dtype=dtype, rows=rows)
    if rows is None:
        rows = math.prod(x.shape[:-1])
    shape = jax.ShapeDtypeStruct((*x.shape[:-1], math.prod(out)), x.dtype)
    call = jax.ffi.ffi_call("kairos_linear", shape)
    return call(x, w, jnp.asarray(rows, jnp.int32)).reshape(*x.shape[:-1], *out)


def pack(w: Float[Array, "I O"]) -> Float[Array, "J I Z"]:
    """The weight's columns, Z at a time, as panels, the last filled up with zeros. Z is what suits
    the machine. Only float32 is packed.
    """
    if w.dtype != jnp.float32:
        return w
    if _library is None:
        raise NotAvailable("load() was not called")
    width = _library.PanelWidth()
    panels = -(-w.shape[1] // width)
    padded = jnp.pad(w, ((0, 0), (0, panels * width - w.shape[1])))
    return padded.reshape(w.shape[0], panels, width).transpose(1, 0, 2)


def _key(compiler: str) -> str:
    """Of the source, XLA's headers, the compiler and the machine's instructions."""
    told = subprocess.run(
        [compiler, "-march=native", "-E", "-dM", "-x", "c++", os.devnull],
        capture_output=True,
        check=False,
    )
    parts = (
        _SOURCE.read_bytes(),
        jax.__version__.encode(),
        platform.machine().encode(),
        told.stdout,
    )
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _compile(compiler: str, library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    # Under another name first: another process may be about to load it.
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        command = [compiler, *_FLAGS, f"-I{jax.ffi.include_dir()}", str(_SOURCE), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise NotAvailable(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
        made.replace(library)
