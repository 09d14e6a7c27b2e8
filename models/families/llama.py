"""Llama 2 and 3, SmolLM2, and others whose `model_type` is llama."""

from models.families.family import Family

LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    gguf="llama",
    gguf_interleaves=True,
    knows_windows=False,
)
