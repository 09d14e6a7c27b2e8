"""Writes the tables of docs/reference/model-support.md from the families that there are.

python tests/support/models_table.py
"""

from pathlib import Path

from models.checkpoint.gguf_file import KINDS
from models.families import FAMILIES

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/reference/model-support.md"


def families() -> str:
    rows = [
        "| family | architecture in transformers | GGUF | examples | tested with |",
        "|---|---|---|---|---|",
    ]
    for each in FAMILIES.values():
        gguf = f"`{each.gguf}`" if each.gguf else f"`{FAMILIES['llama'].gguf}`"
        golden = ROOT / "tests/golden" / each.name
        tested = f"`{golden.relative_to(ROOT)}`" if golden.is_dir() else "nothing"
        examples = ", ".join(f"`{id}`" for id in each.examples)
        rows.append(f"| `{each.name}` | `{each.architecture}` | {gguf} | {examples} | {tested} |")
    return "\n".join(rows)


def quantizations() -> str:
    return f"GGUF quantizations: {', '.join(f'`{name}`' for name in KINDS)}."


def page() -> str:
    """The page as it should be."""
    text = PAGE.read_text()
    for name, made in (("families", families()), ("quantizations", quantizations())):
        before, begin, rest = text.partition(f"<!-- begin {name} -->\n")
        _, end, after = rest.partition(f"<!-- end {name} -->\n")
        text = f"{before}{begin}{made}\n{end}{after}"
    return text


if __name__ == "__main__":
    PAGE.write_text(page())
