"""Qwen 3: each head of q and k is normed. A sliding window is in force in some layers if
`use_sliding_window` is true; published models have false.
"""

from models.families.family import COMMON, Family

QWEN3 = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    gguf="qwen3",
    examples=("Qwen/Qwen3-8B",),
    qk_norm=True,
    windows="by layer",
    biases=("attention_bias",),
    defaults={
        **COMMON,
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "bos_token_id": None,
        "eos_token_id": None,
    },
)
