"""The code of docs/eim.md runs, and its bounds say what the text says."""

import math
import re
from pathlib import Path

import torch

PAGE = Path(__file__).parents[2] / "docs" / "eim.md"


def test_code_of_the_page_runs():
    torch.set_default_dtype(torch.float32)
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 5
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    # x = 2 under z ~ N(0, 1), x ~ N(z, 1); the page's guide is N(0.8, sqrt .41), exact N(1, sqrt .5).
    bound = names["bound"]
    log_evidence = -0.5 * (math.log(4.0 * math.pi) + 2.0)
    assert abs(bound.exp().mean() - math.exp(log_evidence)) < 5.0 * bound.exp().std() / 1000**0.5
    assert bound.mean() < log_evidence + 5.0 * bound.std() / 1000**0.5
