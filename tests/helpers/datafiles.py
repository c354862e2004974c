"""Where the tests find tables: in this repository, or in a folder that the user names."""

import os
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parents[1] / "data"


def find(name):
    """Finds a file or folder of data, or raises FileNotFoundError that says where to put it."""
    named = os.environ.get("PYRO_ANNEAL_DATA")
    for folder in (HERE, *([Path(named)] if named else [])):
        if (folder / name).exists():
            return folder / name
    raise FileNotFoundError(
        f"{name} is not among tests/data; put it into a folder and name that in PYRO_ANNEAL_DATA"
    )


def find_or_skip(name):
    """Finds a file or folder of data, or skips the test that asks and says which is missing."""
    try:
        return find(name)
    except FileNotFoundError as error:
        pytest.skip(str(error))
