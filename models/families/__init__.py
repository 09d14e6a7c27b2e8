"""The families of models that are served, by their Hugging Face `model_type`.

All are decoder-only transformers of the Llama kind (`models.transformer`); a family says what its
models have that others have not. It may import nothing but `family`. A new family is a file here
and a row in `FAMILIES`.
"""

from models.families.family import Family
from models.families.llama import LLAMA
from models.families.mistral import MISTRAL
from models.families.qwen2 import QWEN2
from models.families.qwen3 import QWEN3

__all__ = ["FAMILIES", "Family"]

FAMILIES = {each.name: each for each in (LLAMA, MISTRAL, QWEN2, QWEN3)}
