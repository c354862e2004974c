"""What results with posterior samples are handed to: ArviZ."""

from __future__ import annotations

from typing import Any

__all__ = ["Exported"]


class Exported:
    """Results that :func:`pyro_anneal.results.arviz.to_arviz` converts."""

    def to_arviz(
        self,
        *,
        resample: bool = False,
        num_samples: int | None = None,
        log_likelihood: bool = False,
        seed: int | None = None,
    ) -> Any:
        """Converts to ArviZ; see :func:`pyro_anneal.results.arviz.to_arviz`."""
        from .arviz import to_arviz

        result: Any = self
        return to_arviz(
            result,
            resample=resample,
            num_samples=num_samples,
            log_likelihood=log_likelihood,
            seed=seed,
        )
