"""Keeps the notebooks in step with their text, and executes them.

``python tutorials/build.py`` writes each ``NAME.ipynb`` from ``NAME.md``, formatted, without outputs.
``python tutorials/build.py --execute [NAME ...]`` runs notebooks in full into ``_executed/``, which the
documentation then shows.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jupytext
import nbformat

HERE = Path(__file__).resolve().parent


def texts() -> list[Path]:
    """Lists the tutorials in their order."""
    return sorted(HERE.glob("[0-9]*.md"))


def notebook(text: Path) -> Any:
    """Reads a tutorial as a notebook whose bytes depend on its text alone."""
    result = jupytext.read(text)
    for index, cell in enumerate(result.cells):
        cell["id"] = f"cell-{index:02d}"
    result.metadata.pop("jupytext", None)
    return result


def write(text: Path) -> None:
    """Formats the code of a tutorial, and writes text and notebook."""
    target = text.with_suffix(".ipynb")
    nbformat.write(notebook(text), target)
    subprocess.run([sys.executable, "-m", "ruff", "format", "--quiet", str(target)], check=True)
    formatted = nbformat.read(target, as_version=4)
    original = jupytext.read(text)
    for cell, new in zip(original.cells, formatted.cells, strict=True):
        cell["source"] = new["source"]
    jupytext.write(original, text)
    nbformat.write(notebook(text), target)


def execute(text: Path) -> None:
    """Runs a tutorial in a fresh kernel and keeps it with its outputs."""
    from nbclient import NotebookClient

    target = HERE / "_executed" / f"{text.stem}.ipynb"
    target.parent.mkdir(exist_ok=True)
    began = time.perf_counter()
    result = notebook(text)
    NotebookClient(result, timeout=3600, kernel_name="python3").execute()
    nbformat.write(result, target)
    size = target.stat().st_size / 1024
    print(f"{text.stem}: {time.perf_counter() - began:.0f} s, {size:.0f} kB", flush=True)


def main() -> None:
    """Writes or executes the tutorials that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="beginnings of names, such as 03; all if none")
    parser.add_argument("--execute", action="store_true", help="run instead of write")
    options = parser.parse_args()
    for text in texts():
        if not options.names or text.name.startswith(tuple(options.names)):
            (execute if options.execute else write)(text)


if __name__ == "__main__":
    main()
