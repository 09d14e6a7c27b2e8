"""SLO-aware, disaggregated LLM serving in JAX."""

import sys

from kairos_jax.process import early

__version__ = "0.1.0"

if sys.argv[:1] == ["-m"]:  # a binary starts, by `python -m`, with seconds of imports ahead
    early.end_on_signals()
