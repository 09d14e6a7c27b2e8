"""Qwen 2 and 2.5: biases on q, k and v; a sliding window is stated and not used."""

from models.families.family import Family

QWEN2 = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    gguf="qwen2",
    qkv_bias=True,
    defaults={"num_key_value_heads": 32, "use_sliding_window": False},
)
