"""The code of the README, and the first of the page on losses, runs as it stands."""

import re
from pathlib import Path

import pyro
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
LOSSES = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "losses.md").read_text(), re.DOTALL)


@pytest.fixture(autouse=True)
def _single_precision():
    """Runs as a reader would, in torch's own default dtype."""
    torch.set_default_dtype(torch.float32)


def test_readme_is_one_page_with_code():
    assert len((ROOT / "README.md").read_text().split()) < 1000
    assert len(BLOCKS) == 1


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/glossary.md"])
def test_links_lead_somewhere(page):
    """Files and headings that a page links to exist; the documentation's build checks the rest."""
    here = (ROOT / page).parent
    for target in re.findall(r"\]\(((?!http)[^)]+)\)", (ROOT / page).read_text()):
        path, _, anchor = target.partition("#")
        linked = (here / path) if path else ROOT / page
        assert linked.exists(), target
        headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE) if anchor else []
        slugs = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
        assert not anchor or anchor in slugs, target


def test_first_screen(capsys):
    """The evidence of eight schools is printed, and right (CASES: -36.130816, by quadrature)."""
    namespace = {}
    exec(BLOCKS[0], namespace)
    printed = capsys.readouterr().out
    value, error = re.search(r"lower bound \(nats\)\s+(-?[\d.]+) \+- ([\d.e-]+)", printed).groups()
    assert abs(float(value) + 36.130816) < 0.05 + 5 * float(error)
    assert "SIMULATED" in printed


def test_losses():
    """Training with TVO reaches the optimum of a conjugate model, where the slope is 1/2."""
    exec(LOSSES[0], {})
    assert pyro.param("slope").item() == pytest.approx(0.5, abs=0.05)
