"""Mistral: all layers have a sliding window, unless config.json has null for it. Its GGUF files
are of architecture llama, which computes the same.
"""

from models.families.family import COMMON, Family

MISTRAL = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    gguf=None,
    examples=("mistralai/Mistral-7B-Instruct-v0.3",),
    windows="all",
    defaults={
        **COMMON,
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
)
