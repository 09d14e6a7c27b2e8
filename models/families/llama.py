"""Llama 2 and 3, SmolLM2, and others whose `model_type` is llama."""

from models.families.family import COMMON, Family

LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    gguf="llama",
    examples=("meta-llama/Llama-3.1-8B-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"),
    gguf_interleaves=True,
    biases=("attention_bias", "mlp_bias"),
    defaults={
        **COMMON,
        "vocab_size": 32000,
        "intermediate_size": 11008,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
)
