"""The semi-implicit bound: evidence with a guide whose density is an integral."""

from __future__ import annotations

from torch import Tensor

from ..bounds import independent_multi_upper

__all__ = ["semi_implicit_bound"]


def semi_implicit_bound(log_joint: Tensor, log_own: Tensor, log_others: Tensor) -> Tensor:
    r"""Computes the semi-implicit lower bound on the log evidence.

    The guide draws ``psi_1 ~ q(psi)``, then ``z ~ q(z | psi_1)``; its density is the integral
    ``q(z) = E[q(z | psi)]``. With ``psi_2, ..., psi_K`` fresh draws of ``q(psi)``,

    .. math:: L = \log p(x, z) - \log \frac{1}{K} \sum_{k=1}^K q(z \mid \psi_k).

    The draw that made z must be among the K: it is an exact posterior sample of psi given z, so
    that the mean is an upper bound on log q(z), and ``E[L] <= log p(x)``. (Without it the mean is
    a lower bound on log q(z), and L bounds nothing.) It rises with K from the bound of the pair
    (z, psi) to the evidence lower bound with the exact q(z). As an auxiliary-variable bound its
    reverse distribution of psi given z is self-normalized importance sampling, an SNIS with
    proposal ``q(psi)`` and energy ``-log q(z | psi)``. A semi-implicit prior ``p(z)`` takes the
    mean of fresh draws instead: that one is a lower bound on log p(z).

    Source: Yin and Zhou (2018), *Semi-implicit variational inference*, section 3; Molchanov et al.
    (2019), *Doubly semi-implicit variational inference*; Lawson et al. (2019), App. B, as EIM.

    Args:
        log_joint: ``log p(x, z)`` in nats, shape ``[*batch]``.
        log_own: ``log q(z | psi_1)`` for the draw that made z, in nats, shape ``[*batch]``.
        log_others: ``log q(z | psi_k)`` for K - 1 fresh draws, in nats, ``[K - 1, *batch]``.

    Returns:
        Lower bound in nats, shape ``[*batch]``; minus its sum is a loss.

    Example:
        >>> import torch
        >>> own, others = torch.tensor(5.0).log(), torch.tensor([1.0, 3.0]).log()
        >>> semi_implicit_bound(torch.tensor(6.0).log(), own, others).exp()
        tensor(2.)
    """
    return log_joint - independent_multi_upper(log_own.unsqueeze(0), log_others)
