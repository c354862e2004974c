"""Sphinx configuration: `make docs` builds with warnings as errors, with or without a network."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import shutil
import sys
import urllib.request
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

from pyro_anneal import __version__

project = "pyro_anneal"
author = "the pyro_anneal authors"
copyright = f"2026, {author}"
version = release = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx-mathjax-offline",  # MathJax among the pages: mathematics needs no network
]
exclude_patterns = ["_build", "figures", "jupyter_execute"]
html_theme = "furo"
html_title = f"pyro_anneal {version}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
# Comments that mathematics renders in tables need `\vert`; a bare `|` would end the cell.

# The notebooks lie beside the package, not in its documentation, and carry the outputs of a run in
# full (`make tutorials`). Pages show these outputs: nothing is executed here.
tutorials = HERE / "tutorials"
shutil.rmtree(tutorials, ignore_errors=True)
tutorials.mkdir()
for path in sorted((ROOT / "tutorials").glob("*.ipynb")):
    notebook = json.loads(path.read_text())
    record = notebook["metadata"].get("pyro_anneal", {})
    if record.get("size") == "full":
        note = (
            f"Executed in full, in {record['seconds']} seconds of wall time on a shared processor."
        )
    else:
        note = "Not executed yet: `make tutorials` adds outputs and figures."
    source = f"*{note}* The notebook: `tutorials/{path.name}`."
    cell = {"cell_type": "markdown", "id": "how", "metadata": {}, "source": source}
    notebook["cells"].insert(1, cell)
    (tutorials / path.name).write_text(json.dumps(notebook))
nb_execution_mode = "off"
nb_merge_streams = True


def _reachable(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}objects.inv", timeout=5):
            return True
    except OSError:
        return False


# Links into other projects, where they can be reached: a build without a network has none.
_PROJECTS = {
    "torch": "https://docs.pytorch.org/docs/stable/",
    "pyro": "https://docs.pyro.ai/en/stable/",
    "arviz": "https://python.arviz.org/en/stable/",
    "python": "https://docs.python.org/3/",
}
intersphinx_mapping = {name: (url, None) for name, url in _PROJECTS.items() if _reachable(url)}


def _describe_fields(cls: type, lines: list[str]) -> None:
    """Adds the fields of a result class, whose shapes and units are trailing comments."""
    source = inspect.getsource(cls)
    rows = []
    for field in dataclasses.fields(cls):
        line = rf"^    {field.name}: (.+?)(?:[ ]+# (.+))?$"
        found = re.search(rf"((?:^    # .+\n)*){line}", source, re.MULTILINE)
        if found is None or field.name.startswith("_"):
            continue
        above = " ".join(found[1].replace("    # ", "").split())
        kind = re.sub(r"\s+=\s+.*|\s+\($", "", found[2])
        text = found[3] or above
        if not text and found[2].endswith("("):  # the comment stands in the parentheses
            inside = re.search(r"# (.+)", source[found.end() :].partition("\n    )")[0])
            text = inside[1] if inside else ""
        comment = re.sub(r"(\[[^\]]*\])", r"``\1``", f": {text}") if text else ""
        rows.append(f"* ``{field.name}`` (``{kind}``){comment}")
    if rows:
        lines += ["", "**Fields**", "", *rows, ""]


def _process_docstring(
    app: Any, kind: str, name: str, value: Any, options: Any, lines: list[str]
) -> None:
    documented = any(line.startswith((":param", ":ivar")) for line in lines)
    if kind == "class" and dataclasses.is_dataclass(value) and not documented:
        _describe_fields(value, lines)


def setup(app: Any) -> None:
    """Registers what is computed from the sources."""
    app.connect("autodoc-process-docstring", _process_docstring)
