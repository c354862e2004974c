"""Names and a seed for the examples in docstrings."""

from collections.abc import Iterator
from typing import Any

import pyro
import pytest
import torch


@pytest.fixture(autouse=True)
def _doctest_setup(doctest_namespace: dict[str, Any]) -> Iterator[None]:
    doctest_namespace["torch"] = torch
    doctest_namespace["pyro"] = pyro
    doctest_namespace["dist"] = pyro.distributions
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()
