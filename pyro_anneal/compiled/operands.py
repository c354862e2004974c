"""Names for what an interpreter of graphs hands to the rule of an operation; torch types none of it."""

from __future__ import annotations

from typing import Any

__all__ = ["Given", "Named", "Operand", "Shape", "Target"]

Target = Any  # an overload of an operation of torch
Operand = Any  # a tensor, a number, or a list of them
Given = tuple[Any, ...]  # operands by position
Named = dict[str, Any]  # operands by name
Shape = Any  # of the result for one chain; None where it is no tensor
