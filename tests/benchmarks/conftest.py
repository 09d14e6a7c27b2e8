"""The benchmarks are scripts beside the packages: their modules are found by folder."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
