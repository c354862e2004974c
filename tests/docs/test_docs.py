"""The documentation's code runs, its reference is complete, and its tables match the sources."""

import ast
import functools
import importlib
import inspect
import re
import typing
from pathlib import Path

import pytest
import torch

import pyro_anneal
from pyro_anneal.problems import fitted as fitted_start
from pyro_anneal.problems import gaussian as gaussian_fit

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PACKAGE = ROOT / "pyro_anneal"

# Modules for users, whose every name belongs in the reference. Others are parts of these.
PUBLIC = [
    "pyro_anneal",
    "pyro_anneal.audits",
    "pyro_anneal.results",
    "pyro_anneal.results.arviz",
    "pyro_anneal.bounds",
    "pyro_anneal.results.comparison",
    "pyro_anneal.datasets",
    "pyro_anneal.diagnostics",
    "pyro_anneal.eim",
    "pyro_anneal.results.mutual_information",
    "pyro_anneal.kernels",
    "pyro_anneal.kernels.base",
    "pyro_anneal.losses",
    "pyro_anneal.losses.base",
    "pyro_anneal.mi",
    "pyro_anneal.mi.base",
    "pyro_anneal.mi.critics",
    "pyro_anneal.oed",
    "pyro_anneal.results.plotting",
    "pyro_anneal.schedules",
    "pyro_anneal.weights",
]


@pytest.mark.parametrize("page", ["start", "coming_from", "extend", "losses"])
def test_code_runs(page, monkeypatch):
    """The python blocks of a page run in order, in torch's own default dtype, from short fits."""
    fit = functools.partial(gaussian_fit.fit_gaussian, num_newton=4, num_ascent=20)
    monkeypatch.setattr(fitted_start, "fit_gaussian", fit)
    torch.set_default_dtype(torch.float32)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / f"{page}.md").read_text(), re.DOTALL)
    assert len(blocks) >= 3
    namespace = {"__name__": page}
    for index, block in enumerate(blocks):
        exec(compile(block, f"{page}.md, block {index}", "exec"), namespace)


@pytest.mark.parametrize(("page", "truth"), [("mixtures", -20.0115), ("large", -148.4347)])
def test_first_example_is_right(page, truth):
    """Truths by quadrature over both means, and by the normal density of the regression's data."""
    torch.set_default_dtype(torch.float32)
    namespace = {"__name__": page}
    exec(
        re.findall(r"```python\n(.*?)```", (DOCS / f"{page}.md").read_text(), re.DOTALL)[0],
        namespace,
    )
    evidence = namespace["evidence"]
    assert abs(evidence.lower.item() - truth) < 0.01 + 5 * evidence.std_error.item()
    assert evidence.interval(0.95)[0] < truth


def _load(dotted):
    """Imports a module, or an attribute of one."""
    try:
        return importlib.import_module(dotted)
    except ModuleNotFoundError:
        module, _, name = dotted.rpartition(".")
        return getattr(_load(module), name)


def _documented():
    """Collects the objects that the reference describes."""
    found = []
    for page in sorted((DOCS / "api").glob("*.md")):
        directives = re.findall(
            r"^\.\. auto(\w+):: ([\w.]+)\n((?:   :.*\n)*)", page.read_text(), re.MULTILINE
        )
        for kind, dotted, options in directives:
            target = _load(dotted)
            if kind != "module":
                found.append(target)
            elif ":members:" in options:
                excluded = re.findall(r"\w+", options.partition(":exclude-members:")[2])
                found += [getattr(target, n) for n in target.__all__ if n not in excluded]
    return found


@pytest.mark.parametrize("module", PUBLIC)
def test_reference_has_every_public_name(module):
    described = {id(value) for value in _documented()}
    names = _load(module).__all__
    missing = [
        name
        for name in names
        if name != "__version__"
        and not inspect.ismodule(getattr(_load(module), name))
        and id(getattr(_load(module), name)) not in described
        and typing.get_origin(getattr(_load(module), name)) is None  # aliases of types
    ]
    assert not missing, f"add to docs/api: {missing}"


def test_every_subpackage_is_public():
    assert set(PUBLIC) >= {
        f"pyro_anneal.{path.parent.name}"
        for path in PACKAGE.glob("*/__init__.py")
        if "__all__" in path.read_text()  # rooms that export nothing are internal
    }


def _messages():
    """Collects the literal text of the package, placeholders as ``{}``."""
    texts = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else "{}" for v in node.values]
                texts.append("".join(parts))
    return "\n".join(texts)


def _quoted():
    """Lists the messages quoted in the first column of the tables of errors."""
    for page in ("engine", "errors"):
        text = (
            (DOCS / f"{page}.md").read_text().partition("## Errors")[2 if page == "engine" else 0]
        )
        for row in re.findall(r"^\| (.+?) \|", text, re.MULTILINE):
            yield from re.findall(r"`([^`]+)`", row)


COMPOSED = {
    "the log density is infinite": ("the log density ", "is infinite"),
    " must be at least 1": (" must be at least ",),
}


def test_quoted_errors_exist():
    """Each fragment of a quoted message, between names and dots, is a literal of the package."""
    source = _messages()
    fragments = [
        fragment.strip()
        for quote in _quoted()
        for part in re.split(r'"\w+"|\.\.\.|\((?:K|T|s)\)|\[\.\.\.\]|\bAuto\w+', quote)
        for fragment in COMPOSED.get(part, (part,))
        if len(part.strip()) > 3
    ]
    assert len(fragments) > 30
    assert [fragment for fragment in fragments if fragment not in source] == []


def test_table_of_diagnostics_is_complete():
    table = (
        (DOCS / "errors.md").read_text().partition("## Warnings of a run")[2].partition("##")[0]
    )
    listed = set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))
    sources = [path for room in ("diagnostics", "runs") for path in (PACKAGE / room).glob("*.py")]
    named = [re.findall(r'^ +name="(\w+)",$', path.read_text(), re.MULTILINE) for path in sources]
    assert listed == {name for names in named for name in names}


def test_returns_are_sentences():
    """Before a colon in its first line, napoleon would read what is returned as a type."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for line in re.findall(r"^ *(?:Returns|Yields):\n +(.*)$", path.read_text(), re.MULTILINE):
            if re.search(r"(?<!:):(?!:)", re.sub(r"`[^`]*`|:\w+:(?=`)", "", line)):
                found.append(f"{path.name}: {line}")
    assert not found


def test_version_is_that_of_the_citation():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"version: {pyro_anneal.__version__}" in citation
    released = re.search(r"^date-released: (\S+)$", citation, re.MULTILINE)[1]
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert f"## {pyro_anneal.__version__} ({released})" in changes
