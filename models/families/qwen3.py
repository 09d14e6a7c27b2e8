"""Qwen 3: each head of q and k is normed; a sliding window is stated and not used."""

from models.families.family import Family

QWEN3 = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    gguf="qwen3",
    qk_norm=True,
    defaults={"num_key_value_heads": 32, "head_dim": 128, "use_sliding_window": False},
)
