"""The random-feature attention model, with or without a bias in its weights, and the MLP beside it.

    f(x_0..x_N) = sum_m (1/N) sum_i sigma(x~_0^T W_m x~_i) <v_m, x~_i>,  x~ = [x; 1]       RFA
    W_m with entries N(0, 1/4): on the unit sphere ||x~||^2 = 2, so scores are N(0, 1)
    W_m = W_0 + such,  W_0 = [[I, 0], [0, 0]]: the mean score is <x_0, x_i>                BRFA
    f(x) = sum_k sigma(<w_k, vec(x_0..x_N, 1)>) v_k,  w_k with entries N(0, 1/(N+2))       RFMLP

W and w stay as they were drawn, v is fitted: the model is linear in it, and its features are

    phi_{m,b} = (1/N) sum_i sigma(x~_0^T W_m x~_i) x~_{i,b} / sqrt(M (d + 1))

(the MLP's likewise over sqrt(K)), so that one grid of ridges fits all. The query's own token is no
key. The order of keys doesn't count; to the MLP it does.

Fu et al. 2023, arXiv 2307.11353. Features cost M ((d+1)^2 + 2 N (d+1)) multiplications an example.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from foveate.methods.random_features.ridge import ridge
from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole

ACTIVATIONS = ("relu", "identity")
_EXAMPLES = 256


def with_one(x: Tensor) -> Tensor:
    """x~ = [x; 1]: (..., d) -> (..., d + 1)."""
    return torch.cat((x, torch.ones_like(x[..., :1])), -1)


class _Linear(nn.Module):
    """What both models share: features, and values that are fitted in closed form.

    Attributes:
        values: v, (K, outputs), K features.
    """

    values: Tensor

    def features(self, query: Tensor, keys: Tensor, real: Tensor | None = None) -> Tensor:
        """phi: query (n, d), keys (n, N, d), real (n, N) bool -> (n, K)."""
        raise NotImplementedError

    def forward(self, query: Tensor, keys: Tensor, real: Tensor | None = None) -> Tensor:
        """f: query (n, d), keys (n, N, d), real (n, N) bool, False on padding -> (n, outputs)."""
        return self.features(query, keys, real) @ self.values

    @torch.no_grad()
    def fit(
        self, query: Tensor, keys: Tensor, y: Tensor, penalty: float, real: Tensor | None = None
    ) -> None:
        """Set v to the least of ||phi v - y||^2 + penalty n ||v||^2.

        Args:
            query: (n, d).
            keys: (n, N, d).
            y: (n,) or (n, outputs).
            penalty: the ridge of one example, above 0.
            real: (n, N) bool, False on padding; None is all real.

        Raises:
            InputError: shapes don't fit, or the penalty isn't above 0.
        """
        wanted = y[:, None] if y.dim() == 1 else y
        found = ridge(self.features(query, keys, real), wanted, penalty)
        if found.shape != self.values.shape:
            raise InputError(
                f"fit: y is {tuple(y.shape)}; expected {self.values.shape[1]} outputs for each of "
                f"{len(query)} examples."
            )
        self.values.copy_(found)


class RandomFeatureAttention(_Linear):
    """M frozen heads, and a value vector for each.

    Args:
        dim: d.
        heads: M.
        bias: factor on W_0; 0 is RFA, 1 the paper's BRFA.
        activation: "relu", or "identity", with which it is linear attention.
        outputs: numbers that f gives.
        generator: of W.
        dtype: float64 as it stands: ridges down to 1e-7 want it.

    Attributes:
        weight: W, (M, d+1, d+1), not trained.

    Raises:
        InputError: a size below 1, or an unknown activation.
    """

    weight: Tensor

    def __init__(
        self,
        dim: int,
        heads: int,
        bias: float = 0.0,
        activation: Literal["relu", "identity"] = "relu",
        outputs: int = 1,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        _check(dim=dim, heads=heads, outputs=outputs)
        if activation not in ACTIVATIONS:
            raise InputError(
                f"RandomFeatureAttention(activation={activation!r}): expected one of "
                f"{', '.join(ACTIVATIONS)}."
            )
        self.dim, self.heads, self.bias, self.activation = dim, heads, bias, activation
        drawn = torch.randn(heads, dim + 1, dim + 1, generator=generator, dtype=dtype) / 2
        drawn[:, range(dim), range(dim)] += bias
        self.register_buffer("weight", drawn)
        self.values = nn.Parameter(torch.zeros(heads * (dim + 1), outputs, dtype=dtype))

    @override
    def features(self, query: Tensor, keys: Tensor, real: Tensor | None = None) -> Tensor:
        """phi, (n, M (d+1)), head by head; keys that aren't real count for nothing.

        Raises:
            InputError: shapes don't fit, or an example has no key.
        """
        _check_examples(query, keys, real, self.dim)
        found = [
            self._some(q, k, r)
            for q, k, r in zip(
                query.split(_EXAMPLES), keys.split(_EXAMPLES), _parts(real, len(query))
            )
        ]
        return torch.cat(found)

    def _some(self, query: Tensor, keys: Tensor, real: Tensor | None) -> Tensor:
        q, k = with_one(query.to(self.weight.dtype)), with_one(keys.to(self.weight.dtype))
        scores = torch.einsum("na,mab->nmb", q, self.weight) @ k.mT  # (n, M, N)
        hits = scores.relu() if self.activation == "relu" else scores
        if real is None:
            count: Tensor | int = k.shape[1]
        else:
            # Padding may hold anything: it is left out, not multiplied by 0.
            hits, k = hits.masked_fill(~real[:, None], 0), k.masked_fill(~real[..., None], 0)
            count = real.sum(1)[:, None, None]
        return (hits @ k / count).flatten(1) * len(self.values) ** -0.5


class RandomFeatureMLP(_Linear):
    """RFMLP: one hidden layer of frozen neurons on the concatenated input.

    Args:
        dim: d.
        length: N, keys of every example.
        neurons: K; M (d + 1) matches the fitted numbers of M heads.
        outputs: numbers that f gives.
        generator: of w.
        dtype: as in `RandomFeatureAttention`.

    Raises:
        InputError: a size below 1.
    """

    weight: Tensor

    def __init__(
        self,
        dim: int,
        length: int,
        neurons: int,
        outputs: int = 1,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        _check(dim=dim, length=length, neurons=neurons, outputs=outputs)
        self.dim, self.length = dim, length
        drawn = torch.randn((length + 1) * dim + 1, neurons, generator=generator, dtype=dtype)
        self.register_buffer("weight", drawn / (length + 2) ** 0.5)
        self.values = nn.Parameter(torch.zeros(neurons, outputs, dtype=dtype))

    @override
    def features(self, query: Tensor, keys: Tensor, real: Tensor | None = None) -> Tensor:
        """phi, (n, K).

        Raises:
            InputError: shapes don't fit, or there is padding, which has no place in a layer that
                takes exactly N keys.
        """
        _check_examples(query, keys, real, self.dim)
        if keys.shape[1] != self.length or real is not None:
            raise InputError(
                f"RandomFeatureMLP takes {self.length} keys an example, without padding; got "
                f"{keys.shape[1]}{'' if real is None else ', some of them padding'}."
            )
        row = torch.cat((query[:, None], keys), 1).flatten(1).to(self.weight.dtype)
        return (with_one(row) @ self.weight).relu() * len(self.values) ** -0.5


@dataclass(frozen=True)
class RandomFeatures:
    """The model of one attention layer with frozen query-key maps, and its hyper-parameters.

    Attributes:
        heads: M.
        bias: factor on W_0; 0 is RFA, 1 BRFA.
        activation: "relu" or "identity".
    """

    heads: int = 1000
    bias: float = 0.0
    activation: Literal["relu", "identity"] = "relu"

    def build(
        self, dim: int, outputs: int = 1, generator: torch.Generator | None = None
    ) -> RandomFeatureAttention:
        """The model for tokens of width dim, to be fitted.

        Raises:
            InputError: as `RandomFeatureAttention`.
        """
        return RandomFeatureAttention(
            dim, self.heads, self.bias, self.activation, outputs, generator
        )


def _check(**sizes: int) -> None:
    for name, value in sizes.items():
        whole("random-features", name, value, least=1)


def _check_examples(query: Tensor, keys: Tensor, real: Tensor | None, dim: int) -> None:
    good = query.dim() == 2 and keys.dim() == 3 and len(query) == len(keys)
    if not good or query.shape[1] != dim or keys.shape[2] != dim or not keys.shape[1]:
        raise InputError(
            f"random-features: expected query (n, {dim}) and keys (n, N, {dim}), got "
            f"{tuple(query.shape)} and {tuple(keys.shape)}."
        )
    if real is not None and (real.shape != keys.shape[:2] or not bool(real.any(1).all())):
        raise InputError(
            f"random-features: real is {tuple(real.shape)}; expected {tuple(keys.shape[:2])}, with "
            "at least one real key in each row."
        )


def _parts(real: Tensor | None, count: int) -> Sequence[Tensor | None]:
    if real is None:
        return [None] * max(1, -(-count // _EXAMPLES))
    return real.split(_EXAMPLES)
