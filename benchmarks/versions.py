"""The versions that a record is made with."""

from __future__ import annotations

import platform

import pyro
import torch

import pyro_anneal


def versions() -> dict[str, str]:
    """Returns what decides a record's numbers besides its settings and its seed."""
    return {
        "pyro_anneal": pyro_anneal.__version__,
        "torch": torch.__version__,
        "pyro": pyro.__version__,
        "python": platform.python_version(),
    }
