"""Llama 3.1 8B Instruct in bfloat16 on GPUs or a TPU slice; after the colon, on which.

  kairos serve --config=llama3_8b:gpu1 --port=50051

gpu1: one GPU of 80 GB, one instance that prefills and decodes. gpu4, gpu8: so many of them, an
instance each, of which a quarter begins with decode and roles flow. v5e8: a slice of eight chips of
16 GB, two instances of four, and roles flow. v6e8: eight chips of 32 GB, four instances that
prefill and one of four chips that decodes. `kairos plan` computes what they need and compiles their
steps; `make bench-accelerator` measures the steps of one device.

Not yet run. Expect by arithmetic, of one H100: 4.8 ms to read the weights, 128 KiB of KV a token,
and pools, weights and parked KV within the three quarters of memory that JAX takes by default
(XLA_PYTHON_CLIENT_MEM_FRACTION). The checkpoint is gated: log in with `hf auth login`, or give
--model=DIRECTORY.
"""

import math

from ml_collections import ConfigDict

# (instances, devices of each, tokens in the pool of each) of prefill and decode.
LAYOUTS = {
    "gpu1": ((1, 1, 131072), (1, 1, 262144)),
    "gpu4": ((3, 1, 131072), (1, 1, 262144)),
    "gpu8": ((6, 1, 131072), (2, 1, 262144)),
    "v5e8": ((1, 4, 65536), (1, 4, 196608)),
    "v6e8": ((4, 1, 32768), (1, 4, 524288)),
}


def get_config(layout: str = "gpu1") -> ConfigDict:
    """Every key can be overridden: --config.decode.policy=continuous, --config.slo.ttft=2."""
    prefill, decode = (
        dict(zip(("instances", "devices", "kv_tokens"), numbers, strict=True))
        for numbers in LAYOUTS[layout]
    )
    return ConfigDict(
        {
            "model": "meta-llama/Llama-3.1-8B-Instruct",
            "dtype": "bfloat16",
            "kernels": "auto",
            "chip": {"g": "h100", "v": layout[:3]}[layout[0]],
            "rules": {"vocab": "tensor", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor"},
            "max_context": 8192,
            "max_tokens": 2048,
            "max_requests": 1024,
            "page_size": 64,
            "colocated": layout == "gpu1",
            "fluid": layout in ("gpu4", "gpu8", "v5e8"),
            "prefill": prefill
            | {
                "policy": "kairos_plus",
                "parked_tokens": 32768,
                "max_chunk": 2048,
                "pack": math.inf,
                "prefix_cache": True,
            },
            "decode": decode | {"policy": "kairos_plus", "max_batch": 64, "prefix_cache": True},
            "slo": {"ttft": 1.0, "tpot": 0.05},
        }
    )
