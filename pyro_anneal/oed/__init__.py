"""Optimal experimental design: expected information gain with bounds on both sides."""

from .eig import ExpectedInformationGain, ais_eig

__all__ = ["ExpectedInformationGain", "ais_eig"]
