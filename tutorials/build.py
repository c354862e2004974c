"""Keeps the notebooks in step with their text, and executes them.

``python tutorials/build.py`` writes each ``NAME.ipynb`` from ``NAME.md``, formatted. Outputs are kept
where no code has changed, and dropped otherwise: they belong to the code that made them.
``python tutorials/build.py --execute [NAME ...]`` runs notebooks in full, and keeps their outputs,
which the documentation shows. All eight take ten to twenty minutes of one processor.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
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


def sources(cells: Any) -> list[tuple[str, str]]:
    """Lists the kinds and the text of cells, without what came of them."""
    return [(cell.cell_type, cell.source) for cell in cells]


def is_in_full(committed: Any) -> bool:
    """Tells whether a notebook holds the outputs of a run of all its code at full size."""
    code = [cell for cell in committed.cells if cell.cell_type == "code"]
    counted = [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    return counted and committed.metadata.get("pyro_anneal", {}).get("size") == "full"


def keep_outputs(new: Any, old: Path) -> Any:
    """Copies the outputs of a former run into a notebook with the same code."""
    if not old.exists():
        return new
    former = nbformat.read(old, as_version=4)
    code, before = ([c for c in n.cells if c.cell_type == "code"] for n in (new, former))
    if [cell.source for cell in code] != [cell.source for cell in before]:
        return new
    for cell, known in zip(code, before, strict=True):
        cell["outputs"], cell["execution_count"] = known.outputs, known.execution_count
    if "pyro_anneal" in former.metadata:
        new.metadata["pyro_anneal"] = former.metadata["pyro_anneal"]
    return new


def write(text: Path) -> None:
    """Formats the code of a tutorial, and writes text and notebook."""
    target = text.with_suffix(".ipynb")
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / target.name
        nbformat.write(notebook(text), draft)
        settings = ["--config", str(HERE.parent / "pyproject.toml")]
        command = [sys.executable, "-m", "ruff", "format", "--quiet", *settings, str(draft)]
        subprocess.run(command, check=True)
        formatted = nbformat.read(draft, as_version=4)
    original = jupytext.read(text)
    for cell, new in zip(original.cells, formatted.cells, strict=True):
        cell["source"] = new["source"]
    jupytext.write(original, text)
    nbformat.write(keep_outputs(notebook(text), target), target)


def execute(text: Path) -> None:
    """Runs a tutorial in full, in a fresh kernel, and keeps its outputs in its notebook."""
    from nbclient import NotebookClient

    os.environ.pop("PYRO_ANNEAL_TUTORIAL_SIZE", None)
    os.environ["PYRO_ANNEAL_PROGRESS"] = "0"
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # tqdm's, without ipywidgets
    target = text.with_suffix(".ipynb")
    began = time.perf_counter()
    result = notebook(text)
    NotebookClient(result, timeout=3600, kernel_name="python3", record_timing=False).execute()
    seconds = round(time.perf_counter() - began)
    result.metadata["pyro_anneal"] = {"size": "full", "seconds": seconds}
    result.metadata.pop("language_info", None)
    nbformat.write(result, target)
    print(f"{text.stem}: {seconds} s, {target.stat().st_size / 1024:.0f} kB", flush=True)


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
