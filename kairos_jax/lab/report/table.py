"""What a sweep found, as a tidy table: a row a cell."""

import csv
import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kairos_jax.lab.cells import Result


def write_table(folder: Path, results: Sequence[Result]) -> list[Path]:
    """Writes cells.csv, and cells.parquet where pyarrow is installed. Returns what was written."""
    rows = [row(each) for each in results]
    names = list(dict.fromkeys(name for each in rows for name in each))
    path = folder / "cells.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    if importlib.util.find_spec("pyarrow") is None:
        return [path]
    arrow, parquet = (importlib.import_module(name) for name in ("pyarrow", "pyarrow.parquet"))
    columns = {name: [each.get(name) for each in rows] for name in names}
    parquet.write_table(arrow.table(columns), path.with_suffix(".parquet"))
    return [path, path.with_suffix(".parquet")]


def row(result: Result) -> dict[str, Any]:
    """A cell and its figures, a column each; None for what is not known."""
    cell, summary = result.cell, dict(result.summary)
    prefill, decode = cell.policies
    flat = {
        "layout": str(cell.layout),
        "num_prefill": cell.layout.num_prefill,
        "num_decode": cell.layout.num_decode,
        "colocated": cell.layout.colocated,
        "fluid": cell.layout.fluid,
        "prefill_policy": prefill,
        "decode_policy": decode,
        "max_batch": cell.max_batch,
        "pack": cell.pack,
        "rate": cell.rate,
    }
    for index, value in enumerate(summary.pop("e2e_by_output_decile"), 1):
        flat[f"e2e_output_decile_{index}"] = value
    for index, each in enumerate(summary.pop("e2e_by_class"), 1):
        flat |= {f"class_{index}_{name}": value for name, value in each.items()}
    for name in ("ttft_s", "tpot_s"):
        quantiles = summary.pop(name)
        flat |= {f"{name[:4]}_{q}_s": value for q, value in quantiles.items()}
    return flat | summary
