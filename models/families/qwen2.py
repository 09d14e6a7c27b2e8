"""Qwen 2 and 2.5: biases on q, k and v. A sliding window is in force in some layers if
`use_sliding_window` is true; published models have false.
"""

from models.families.family import COMMON, Family

QWEN2 = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    gguf="qwen2",
    examples=("Qwen/Qwen2.5-7B-Instruct",),
    qkv_bias=True,
    windows="by layer",
    defaults={
        **COMMON,
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "bos_token_id": None,
        "eos_token_id": None,
    },
)
