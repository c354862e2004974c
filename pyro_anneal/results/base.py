"""What every result can do, whatever computed it: one vocabulary.

A result has ``directions`` (the runs behind it), ``sides`` (its bounds), ``diagnostics`` and a
``verdict`` from them, a ``provenance``, a ``summary``, a picture, a data frame and a file.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ..models.types import Figure
from .files import load_result, save_result, stored
from .findings import Diagnostic, Verdict, judge
from .tables import Table

if TYPE_CHECKING:
    from typing_extensions import Self

    from .provenance import Provenance
    from .run import AnnealedRun

__all__ = ["Result"]

Columns = Mapping[str, "Tensor | Sequence[object]"]


class Result(ABC):
    """What every result can do."""

    diagnostics: tuple[Diagnostic, ...]
    provenance: Provenance | None
    # Of words of the vocabulary that a class lacks: why, and what to use.
    _absent: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        stored(cls)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Explains why a name is missing."""
            kind = type(self)
            message = f"{kind.__name__!r} object has no attribute {name!r}"
            if name in kind._absent:
                message = f"{kind.__name__} has no {name}(): {kind._absent[name]}"
            raise AttributeError(message, name=name, obj=self)

    @property
    @abstractmethod
    def directions(self) -> dict[str, AnnealedRun]:
        """The runs behind this result by direction, ``"forward"`` and ``"reverse"``."""

    @property
    @abstractmethod
    def sides(self) -> dict[str, Tensor]:
        """The bounds by side, ``"lower"`` and ``"upper"``, in nats; only those that there are."""

    @abstractmethod
    def _table(self) -> Table:
        """Collects what :meth:`summary` shows."""

    @abstractmethod
    def _columns(self) -> tuple[Columns, Columns]:
        """Collects the index and the columns of :meth:`to_dataframe`, one entry per row."""

    @abstractmethod
    def plot(self) -> Figure:
        """Draws the result and returns a matplotlib figure."""

    @property
    def verdict(self) -> Verdict:
        """One word on the diagnostics: ``"ok"``, ``"suspicious"`` or ``"failed"``.

        See :func:`pyro_anneal.results.findings.judge` for the rule. ``"ok"`` says that no check
        found anything; no list of checks is complete.
        """
        return judge(self.diagnostics)

    def summary(self) -> str:
        """Formats a short table of the result."""
        return self._table().to_text()

    def __repr__(self) -> str:
        return self.summary()

    def _repr_html_(self) -> str:
        """Formats the same table for notebooks."""
        return self._table().to_html()

    def to_dataframe(self) -> Any:
        """Converts to a ``pandas.DataFrame``, a row per datum, pair or model.

        Returns:
            The data frame. Bounds and their standard errors are in nats.

        Raises:
            ImportError: If pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError(
                "data frames need the package pandas: pip install 'pyro-anneal[pandas]'"
            ) from error
        index, columns = (
            {name: _values(values) for name, values in part.items()} for part in self._columns()
        )
        frame = pandas.DataFrame(columns)
        if not index:
            return frame
        names = list(index)
        frame.index = (
            pandas.Index(index[names[0]], name=names[0])
            if len(names) == 1
            else pandas.MultiIndex.from_arrays(list(index.values()), names=names)
        )
        return frame

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the result to one file without pickle; see :mod:`pyro_anneal.results.files`.

        Args:
            path: Where to write; an existing file is replaced.
        """
        save_result(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads a result of this class that :meth:`save` wrote, with its tensors on the host.

        Args:
            path: The file.

        Raises:
            ValueError: If the file is damaged, holds another class, or is of a later version.
        """
        result: Self = load_result(cls, path)
        return result


def _values(values: Tensor | Sequence[object]) -> Any:
    return values.detach().cpu().flatten().numpy() if isinstance(values, Tensor) else list(values)
