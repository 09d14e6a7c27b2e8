"""The commands that documents and docstrings show."""

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_START = re.compile(r"^ *(?:kairos [a-z]+\b|make [a-z]+|curl )")


def of_page(name: str) -> list[str]:
    """The commands in the blocks of a page that have no language, each in one line."""
    blocks = _BLOCK.findall((ROOT / name).read_text())
    return [command for language, text in blocks if not language for command in _commands(text)]


def of_docstrings() -> Iterator[str]:
    """The commands of binaries and configs."""
    for pattern in ("kairos_jax/*.py", "kairos_jax/config/__main__.py", "configs/*.py"):
        for path in sorted(ROOT.glob(pattern)):
            yield from _commands(path.read_text().split('"""')[1])


def of_make(*targets: str) -> list[str]:
    """The commands that `make` runs for targets."""
    # Without what a `make` above this one tells the makes below it.
    own = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    dry = ["make", "--dry-run", *targets]
    said = subprocess.run(dry, cwd=ROOT, env=own, capture_output=True, text=True, check=True)
    return _commands(re.sub(r"^\S+ -m kairos_jax\.", "kairos ", said.stdout, flags=re.MULTILINE))


def everywhere() -> list[str]:
    """The commands of all pages and docstrings, and those of `make`."""
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "*.md"], capture_output=True, text=True, check=True
    )
    pages = [command for page in listed.stdout.split() for command in of_page(page)]
    made = of_make("demo", "serve", "cluster", "sweep", "paper", "agreement")
    return [*pages, *of_docstrings(), *made]


def words(command: str) -> list[str]:
    """As a shell splits them, without a comment."""
    return shlex.split(command, comments=True)


def flags(command: str) -> list[str]:
    """The names of the flags that it gives."""
    return [word[2:].partition("=")[0] for word in words(command) if word.startswith("--")]


def _commands(text: str) -> list[str]:
    # An example ends where its quotes are closed: a body of curl may have several lines.
    joined = re.sub(r"\\\n\s*", "", text)
    return [line.strip() for line in joined.splitlines() if _START.match(line)]
