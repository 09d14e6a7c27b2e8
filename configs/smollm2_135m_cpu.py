"""SmolLM2-135M-Instruct on a CPU: prefill on one CPU device, decode on another, one process.

  kairos serve --config=smollm2_135m_cpu --port=50051

Expect, on two AVX-512 cores: ready within a minute the first time (it fetches 93 MB, compiles and
measures the step times; later starts reuse all three), 3.5 GB of memory, about 700 prompt tokens a
second and 35 ms a token for a lone request.
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
            "colocated": False,
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
