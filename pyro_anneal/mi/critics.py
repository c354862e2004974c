r"""Critics: functions T(x, z) that score how well x and z belong together.

A critic is any callable (usually an ``nn.Module``) that maps ``x [*batch, Dx]`` and
``z [*batch, Dz]``, with batches that broadcast, to scores ``[*batch]`` in nats. Bounds flatten
events before they call it. One more method is optional: ``pairwise(x, z)``, from ``[N, Dx]`` and
``[M, Dz]`` to all ``[N, M]`` scores, where that can be done in fewer than ``N M`` passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

__all__ = [
    "ConcatCritic",
    "Critic",
    "LikelihoodCritic",
    "RelativeCritic",
    "SeparableCritic",
    "indexed_scores",
    "pairwise_scores",
]

_MAX_ROWS = 2**17  # rows of one pass of a concatenated critic when many pairs are scored
_MAX_TABLE = 2**24  # entries of a full table of scores of which only some are wanted


def _apply(network: nn.Module, value: Tensor) -> Tensor:
    """Applies a network to vectors in its own dtype: labels are integers or booleans."""
    weight = next(network.parameters(), None)
    return network(value if weight is None else value.to(weight.dtype))  # type: ignore[no-any-return]


def _encode(value: Tensor, width: int) -> Tensor:
    """Encodes integer labels one-hot where a network was made for that many classes."""
    is_label = not value.is_floating_point() and value.shape[-1] == 1 and width > 1
    if not is_label:
        return value
    labels = value.squeeze(-1).long()
    if bool((labels < 0).any()) or bool((labels >= width).any()):
        raise ValueError(
            f"labels of {width} classes must lie in 0..{width - 1}, got {int(labels.min())} to "
            f"{int(labels.max())}"
        )
    return nn.functional.one_hot(labels, width)


class Critic(Protocol):
    """Scores pairs: ``x [*batch, Dx]``, ``z [*batch, Dz]`` to ``[*batch]``, in nats."""

    def __call__(self, x: Tensor, z: Tensor, /) -> Tensor:
        """Scores pairs."""
        ...


def _mlp(sizes: Sequence[int], activation: type[nn.Module]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in range(len(sizes) - 1):
        layers.append(nn.Linear(sizes[i], sizes[i + 1]))
        if i < len(sizes) - 2:
            layers.append(activation())
    return nn.Sequential(*layers)


class ConcatCritic(nn.Module):
    r"""Scores pairs with one network on the concatenated vector, ``T(x, z) = f([x, z])``.

    It can represent any critic, at the price of ``N M`` passes for all pairs of N x's and M z's.
    Its first layer is split, ``A x + B z + b``, so that this layer at least runs ``N + M`` times.
    The paper uses two or three hidden layers (Brekelmans et al., 2022, experiments).

    Args:
        x_dim: Flattened size of x.
        z_dim: Flattened size of z.
        hidden: Sizes of the hidden layers.
        activation: Class of the nonlinearity; smooth by default, since MINE-AIS takes gradients
            of the critic with respect to z.

    Raises:
        ValueError: If ``hidden`` is empty: a linear critic of [x, z] has no interaction.

    Example:
        >>> critic = ConcatCritic(x_dim=3, z_dim=2, hidden=[8])
        >>> critic(torch.zeros(5, 3), torch.zeros(4, 5, 2)).shape
        torch.Size([4, 5])
    """

    def __init__(
        self,
        x_dim: int,
        z_dim: int,
        hidden: Sequence[int] = (256, 256),
        *,
        activation: type[nn.Module] = nn.SiLU,
    ) -> None:
        super().__init__()
        if not hidden:
            raise ValueError("ConcatCritic needs at least one hidden layer, got hidden=[]")
        self.first_x = nn.Linear(x_dim, hidden[0])
        self.first_z = nn.Linear(z_dim, hidden[0], bias=False)
        self.rest = nn.Sequential(activation(), _mlp([*hidden, 1], activation))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Scores pairs: ``x [*batch, Dx]``, ``z [*batch, Dz]`` to ``[*batch]``."""
        x, z = _encode(x, self.first_x.in_features), _encode(z, self.first_z.in_features)
        _check_width("x", x, self.first_x.in_features)
        _check_width("z", z, self.first_z.in_features)
        return self.rest(_apply(self.first_x, x) + _apply(self.first_z, z)).squeeze(-1)  # type: ignore[no-any-return]


class SeparableCritic(nn.Module):
    r"""Scores pairs by an inner product of features, ``T(x, z) = f(x)^\top g(z) + a(x) + b(z)``.

    All pairs of N x's and M z's cost ``N + M`` passes and one matrix product. With ``hidden=[]``
    and linear features it is the bilinear critic. The offsets a and b cost nothing and matter:
    the best critic ``log p(x|z) + c(x)`` of a Gaussian model has a quadratic part in z alone.

    Args:
        x_dim: Flattened size of x.
        z_dim: Flattened size of z.
        hidden: Sizes of the hidden layers of each side.
        num_features: Size of the feature vectors.
        activation: Class of the nonlinearity.

    Example:
        >>> critic = SeparableCritic(x_dim=3, z_dim=2, hidden=[8], num_features=4)
        >>> x, z = torch.randn(5, 3), torch.randn(6, 2)
        >>> critic.pairwise(x, z).shape
        torch.Size([5, 6])
        >>> torch.allclose(critic.pairwise(x, z)[2, 3], critic(x[2], z[3]))
        True
    """

    def __init__(
        self,
        x_dim: int,
        z_dim: int,
        hidden: Sequence[int] = (256, 256),
        *,
        num_features: int = 32,
        activation: type[nn.Module] = nn.SiLU,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.x_dim, self.z_dim = x_dim, z_dim
        self.x_net = _mlp([x_dim, *hidden, num_features + 1], activation)
        self.z_net = _mlp([z_dim, *hidden, num_features + 1], activation)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Scores pairs: ``x [*batch, Dx]``, ``z [*batch, Dz]`` to ``[*batch]``."""
        f, g = self._features(x, z)
        inner = (f[..., :-1] * g[..., :-1]).sum(dim=-1)
        return inner + f[..., -1] + g[..., -1]

    def _features(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        x, z = _encode(x, self.x_dim), _encode(z, self.z_dim)
        return _apply(self.x_net, x), _apply(self.z_net, z)

    def pairwise(self, x: Tensor, z: Tensor) -> Tensor:
        """Scores all pairs in N + M passes: ``[N, Dx]``, ``[M, Dz]`` to ``[N, M]``."""
        f, g = self._features(x, z)
        return f[:, :-1] @ g[:, :-1].mT + f[:, -1:] + g[:, -1]


class RelativeCritic(nn.Module):
    r"""Shows a critic where z lies relative to a guide, :math:`(z - \mu(x)) / \sigma(x)`.

    A posterior may be a hundred times narrower than the prior. A critic of (x, z) would first have
    to learn where it is; this one starts at its location and scale. Any critic remains possible,
    since the map is one-to-one for each x, so bounds keep their directions.

    Args:
        guide: Callable of flattened x that returns a distribution with ``mean`` and ``stddev``,
            such as the Gaussian encoder of the bound. Its parameters train along where they
            require gradients.
        critic: The critic of x and the standardized z.

    Example:
        >>> guide = lambda x: dist.Normal(3.0 * x, 0.1).to_event(1)
        >>> critic = RelativeCritic(guide, lambda x, z: z.sum(-1))
        >>> critic(torch.tensor([[2.0]]), torch.tensor([[6.2]]))
        tensor([2.0000])
    """

    def __init__(
        self, guide: Callable[[Tensor], Any], critic: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.guide = guide
        self.critic = critic

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Scores pairs: ``x [*batch, Dx]``, ``z [*batch, Dz]`` to ``[*batch]``."""
        q = self.guide(x)
        return self.critic(x, (z - q.mean) / q.stddev)


class LikelihoodCritic(nn.Module):
    r"""Scores pairs by a learned likelihood, :math:`T = \log r(x|z) + \log p(z) - \log q(z|x)`.

    With this critic the energy-based posterior of :class:`MINEAIS` is that of the model r,
    :math:`q(z|x) e^{T(x, z)} / Z(x) = p(z) r(x|z) / r(x)`, and by the chain rule of divergences

    .. math:: \mathrm{IBAL} = I - E\, \mathrm{KL}(p(z|x) \| r(z|x))
        \ge I - E\, \mathrm{KL}(p(x|z) \| r(x|z)),

    so what fitting r by maximum likelihood loses bounds what the bound loses. At
    ``r(x|z) = p(x|z)`` this is the best critic of GIWAE and MINE-AIS. It suits decoders: the density
    that is unknown is then close to a family that is known. Train r first,
    ``BarberAgakov(None, likelihood).fit(x, z)``, which needs pairs only; the loss of the bound then
    moves it toward the posterior.

    Args:
        likelihood: Callable of flattened z that returns a distribution of flattened x, of batch
            shape ``[*batch]``.
        prior: Distribution p(z) of flattened z.
        guide: Callable of flattened x that returns the distribution q(z|x) of the bound.

    Example:
        >>> prior, guide = dist.Normal(torch.zeros(1), 1.0).to_event(1), lambda x: prior.expand([2])
        >>> critic = LikelihoodCritic(lambda z: dist.Normal(z, 1.0).to_event(1), prior, guide)
        >>> critic(torch.zeros(2, 1), torch.zeros(5, 2, 1)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self, likelihood: Callable[[Tensor], Any], prior: Any, guide: Callable[[Tensor], Any]
    ) -> None:
        super().__init__()
        self.likelihood = likelihood
        self.prior = prior
        self.guide = guide

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Scores pairs: ``x [*batch, Dx]``, ``z [*batch, Dz]`` to ``[*batch]``."""
        log_r: Tensor = self.likelihood(z).log_prob(x)
        log_ratio: Tensor = self.prior.log_prob(z) - self.guide(x).log_prob(z)
        return log_r + log_ratio


def score(critic: Critic, x: Tensor, z: Tensor) -> Tensor:
    """Scores pairs and checks the shape of the scores.

    Args:
        critic: Any critic.
        x: Flattened x, shape ``[*batch, Dx]``.
        z: Flattened z, of a batch that broadcasts with that of x.

    Returns:
        Scores in nats, shape ``batch``.

    Raises:
        ValueError: If the critic returns another shape.
    """
    scores = critic(x, z)
    expected = torch.broadcast_shapes(x.shape[:-1], z.shape[:-1])
    if scores.shape != expected:
        raise ValueError(
            f"the critic returned shape {list(scores.shape)} for x of shape {list(x.shape)} and z "
            f"of shape {list(z.shape)}: expected one score per pair, {list(expected)}; sum over "
            "the last dimension, or .squeeze(-1) a network that ends in one unit"
        )
    return scores


def _check_width(name: str, value: Tensor, expected: int) -> None:
    if value.shape[-1] != expected:
        raise ValueError(
            f"the critic was made for {name}_dim={expected}, got {name} of shape "
            f"{list(value.shape)} after flattening"
        )


def pairwise_scores(critic: Critic, x: Tensor, z: Tensor) -> Tensor:
    """Scores all pairs of N x's and M z's, by the critic's own ``pairwise`` where it has one.

    Args:
        critic: Any critic.
        x: Flattened x, shape ``[N, Dx]``.
        z: Flattened z, shape ``[M, Dz]``.

    Returns:
        Scores in nats, shape ``[N, M]``.

    Example:
        >>> inner = lambda x, z: (x * z).sum(-1)
        >>> pairwise_scores(inner, torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [5.0]]))
        tensor([[ 3.,  5.],
                [ 6., 10.]])
    """
    fast = getattr(critic, "pairwise", None)
    if fast is not None:
        return fast(x, z)  # type: ignore[no-any-return]
    # Chunks bound the memory of the hidden layers when no graph is kept.
    rows = max(1, _MAX_ROWS // z.shape[0])
    return torch.cat([score(critic, part.unsqueeze(1), z) for part in x.split(rows)])


def indexed_scores(critic: Critic, x: Tensor, z: Tensor, index: Tensor) -> Tensor:
    """Scores each x against M chosen z's.

    Args:
        critic: Any critic.
        x: Flattened x, shape ``[N, Dx]``.
        z: Flattened z, shape ``[L, Dz]``.
        index: Rows of z for each x, shape ``[N, M]``.

    Returns:
        Scores in nats, shape ``[N, M]``.

    Example:
        >>> inner = lambda x, z: (x * z).sum(-1)
        >>> x, z = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [5.0]])
        >>> indexed_scores(inner, x, z, torch.tensor([[1], [0]]))
        tensor([[5.],
                [6.]])
    """
    if hasattr(critic, "pairwise") and x.shape[0] * z.shape[0] <= _MAX_TABLE:
        return pairwise_scores(critic, x, z).gather(1, index)
    rows = max(1, _MAX_ROWS // index.shape[1])
    parts = zip(x.split(rows), index.split(rows), strict=True)
    return torch.cat([score(critic, part.unsqueeze(1), z[chosen]) for part, chosen in parts])
