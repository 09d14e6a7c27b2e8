"""Text to token ids and back: tokenizers, chat templates, incremental detokenization.

`hugging_face.py` and `gguf_tokenizer.py` read a model's files. `template_process.py` runs
`chat_template.py` in a process of its own.

May import: nothing of `kairos_jax`. Begin with `tokenizer.py`.
"""
