"""What to use instead of a flag that is not there: names of other servers, and near names."""

import difflib
from collections.abc import Iterable

_CONTEXT = ("config.max_context",)
_MESH = ("config.prefill.devices", "config.decode.devices")
_INSTANCES = ("config.prefill.instances", "config.decode.instances")
_POOL = ("config.prefill.kv_tokens", "config.decode.kv_tokens")
_CHUNK = ("config.prefill.max_chunk",)
_BATCH = ("config.decode.max_batch",)
_PREFIX = ("config.prefill.prefix_cache", "config.decode.prefix_cache")
_POLICY = ("config.prefill.policy", "config.decode.policy")

# Flags of vLLM, SGLang and TGI.
FAMILIAR = {
    "model_path": ("model",),
    "model_id": ("model",),
    "max_model_len": _CONTEXT,
    "context_length": _CONTEXT,
    "max_total_tokens": _CONTEXT,
    "max_input_length": _CONTEXT,
    "tensor_parallel_size": _MESH,
    "tp": _MESH,
    "tp_size": _MESH,
    "num_shard": _MESH,
    "data_parallel_size": _INSTANCES,
    "dp": _INSTANCES,
    "dp_size": _INSTANCES,
    "gpu_memory_utilization": _POOL,
    "mem_fraction_static": _POOL,
    "cuda_memory_fraction": _POOL,
    "max_num_seqs": _BATCH,
    "max_running_requests": _BATCH,
    "max_batch_size": _BATCH,
    "max_concurrent_requests": ("config.max_requests",),
    "max_num_batched_tokens": _CHUNK,
    "chunked_prefill_size": _CHUNK,
    "enable_chunked_prefill": _CHUNK,
    "max_prefill_tokens": _CHUNK,
    "max_batch_prefill_tokens": _CHUNK,
    "enable_prefix_caching": _PREFIX,
    "disable_radix_cache": _PREFIX,
    "block_size": ("config.page_size",),
    "attention_backend": ("config.kernels",),
    "scheduling_policy": _POLICY,
    "schedule_policy": _POLICY,
    "api_key": ("api_keys_file",),
    "allowed_origins": ("cors_origins",),
    "ssl_certfile": ("public_tls_cert",),
    "ssl_keyfile": ("public_tls_key",),
    "otlp_traces_endpoint": ("otlp_endpoint",),
}


def instead(name: str, known: Iterable[str]) -> str:
    """What to use instead of the flag `name`, as words that go on after its name; empty if nothing
    is near. known: the flags that there are.
    """
    known = set(known)
    plain = name.lower().replace("-", "_")
    without_no = plain.removeprefix("no_")
    if plain in known:
        return f"it is --{plain} here"
    for each in (plain, without_no):
        familiar = [flag for flag in FAMILIAR.get(each, ()) if flag in known]
        if familiar:
            return f"use {_listed(familiar)}"
        keys = [f for f in known if f.startswith("config.") and f.rpartition(".")[2] == each]
        if keys:
            return f"use {_listed(sorted(keys, reverse=True))}"
    if plain.startswith("config."):
        keys = {name for name in known if "." in name}
        return " ".join([*_near(plain.rpartition(".")[2], keys), "`kairos config` lists the keys"])
    return "".join(_near(plain, known))


def _near(word: str, known: set[str]) -> list[str]:
    """The flags that are most like the word, as a question; nothing if none is."""
    flags = [name for name in known if "." not in name]
    found = difflib.get_close_matches(word, flags, n=1)
    if not found:  # by the last part of a key
        near = difflib.get_close_matches(word, {name.rpartition(".")[2] for name in known}, n=1)
        found = sorted(name for name in known if name.rpartition(".")[2] in near)
    return [f"did you mean {_listed(found, 'or')}?"] if found else []


def _listed(names: list[str], joint: str = "and") -> str:
    return f" {joint} ".join(f"--{name}" for name in names)
