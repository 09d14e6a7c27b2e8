"""Mistral: a sliding window is in force unless config.json has null for it. Its GGUF files go by
llama, which computes the same.
"""

from models.families.family import Family

MISTRAL = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    gguf=None,
    defaults={"num_key_value_heads": 8, "sliding_window": 4096},
)
