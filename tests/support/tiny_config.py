"""A tiny random model for tests, with --model=tests/golden/llama or another beside it."""

import math

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Compiles in seconds."""
    return ConfigDict(
        {
            "model": "",
            "dtype": "float32",
            "kernels": "cpu",
            "rules": {"vocab": "tensor", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor"},
            "max_context": 128,
            "max_tokens": 64,
            "max_requests": 16,
            "page_size": 16,
            "colocated": False,
            "prefill": {
                "instances": 1,
                "devices": 1,
                "policy": "kairos_plus",
                "kv_tokens": 1024,
                "parked_tokens": 1024,
                "max_chunk": 32,
                "pack": math.inf,
                "prefix_cache": True,
            },
            "decode": {
                "instances": 1,
                "devices": 1,
                "policy": "kairos_plus",
                "kv_tokens": 1024,
                "max_batch": 4,
                "prefix_cache": True,
            },
            "slo": {"ttft": 30.0, "tpot": 30.0},
        }
    )
