"""SmolLM2-135M-Instruct on a CPU: one instance that prefills and decodes, on one CPU device.

  kairos serve --config=smollm2_135m_cpu_colocated --port=50051

The decode slack sets how large a prefill chunk fits between two decode steps. Everything else is as
in smollm2_135m_cpu.py, whose two instances share the same cores: compare the two under a load of
yours.
"""

import math

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Every key can be overridden: --config.decode.policy=continuous, --config.slo.ttft=2."""
    return ConfigDict(
        {
            "model": "smollm2-135m-instruct",
            "dtype": "float32",
            "kernels": "auto",
            "rules": {"vocab": "tensor", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor"},
            "max_context": 2048,
            "max_tokens": 1024,
            "max_requests": 1024,
            "page_size": 64,
            "colocated": True,
            # The instances; of these, kv_tokens and parked_tokens are not used.
            "prefill": {
                "instances": 1,
                "devices": 1,
                "policy": "kairos_plus",
                "kv_tokens": 16384,
                "parked_tokens": 16384,
                "max_chunk": 256,
                "pack": math.inf,
                "prefix_cache": True,
            },
            # How they decode; of these, instances and devices are not used.
            "decode": {
                "instances": 1,
                "devices": 1,
                "policy": "kairos_plus",
                "kv_tokens": 32768,
                "max_batch": 32,
                "prefix_cache": True,
            },
            "slo": {"ttft": 2.0, "tpot": 0.15},
        }
    )
