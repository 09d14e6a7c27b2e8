"""What documents and docstrings point to is there."""

import importlib
import re
import subprocess
from pathlib import Path

import models_table
import pytest

from models.families import FAMILIES

ROOT = Path(__file__).parent.parent
LISTED = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True, check=True)
FILES = [ROOT / name for name in LISTED.stdout.split()]
PAGES = [path for path in FILES if path.suffix == ".md" and path.exists()]
SOURCES = [path for path in FILES if path.suffix in (".py", ".proto") and "_pb2" not in path.name]
TOP = "kairos_jax|schedulers|models|tests|configs|benchmarks|deploy|docs|examples"
PATH = re.compile(rf"\b(?:{TOP})/[\w./-]+\.(?:py|proto|md|cc|json|yaml|js|png)\b")
DOTTED = re.compile(r"\b(?:kairos_jax|schedulers|models)(?:\.\w+)+")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as they are linked to."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_paths_of_a_page_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked), target
    for path in PATH.findall(text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize(("page", "most"), [("README.md", 150), ("WORKSPACE.md", 250)])
def test_a_page_stays_short(page, most):
    assert len((ROOT / page).read_text().splitlines()) <= most


def test_the_tables_of_models_are_those_of_the_code():
    assert models_table.page() == models_table.PAGE.read_text()
    assert all(each.examples for each in FAMILIES.values())


def test_the_picture_of_the_live_page_is_small():
    assert (ROOT / "docs" / "live-page.png").stat().st_size < 200_000


def there(dotted: str) -> bool:
    """Whether it is a module, or something in one."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            if part in getattr(found, "__dataclass_fields__", ()):
                return True
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def test_what_the_code_names_in_words_is_there():
    missing = []
    for path in SOURCES:
        text = re.sub(r"https?://\S+|configs/NAME\.py", "", path.read_text())
        words = [text] if path.suffix == ".proto" else re.findall(r'"""[^"]*"""|#[^\n]*', text)
        for name in {name for part in words for name in DOTTED.findall(part)}:
            if not there(name) and not (ROOT / name).exists():
                missing.append(f"{name_of(path)}: {name}")
        missing += [f"{name_of(path)}: {p}" for p in PATH.findall(text) if not (ROOT / p).exists()]
    assert not missing
