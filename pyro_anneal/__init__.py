"""Certified bounds on log evidence and mutual information for any Pyro model."""

from ._version import __version__

__all__ = ["__version__"]
