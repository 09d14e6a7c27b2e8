"""Text to token ids and back: tokenizers, chat templates, incremental detokenization.

May import: nothing of `kairos_jax`. Begin with `tokenizer.py`.
"""
