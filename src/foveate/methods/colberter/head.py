"""ColBERTer: what turns an encoder's states into one vector and few small word vectors.

Hofstätter et al. 2022, arXiv 2203.13088, section 3. From the states p~ of one encoder:

    p_CLS = W_CLS p~_1 (+ bias)                      equation 3: the single vector, d_c numbers
    p.    = W_t p~ (+ bias)                          equation 4: d_t numbers for each sub-word
    p^_w  = mean of p. over w's sub-words            equation 5: one vector for each whole word
    r     = ReLU(W_s p^ + b_s),  p^ <- r p^          equation 7: contextual stopwords, passages only
    p^    <- W_u p^                                  Uni-ColBERTer, queries too

b_s begins at 1, so that all gates begin open. A word whose gate is 0 is dropped when a passage is
indexed; in training its zero vector stays, so that it can come back.

The means are linear, so that they may be taken before or after W_t; after is cheaper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from foveate.methods.colberter.losses import Weights, margin_mse, open_gates
from foveate.methods.colberter.score import Encoding, mixed, single_score, token_score
from foveate.methods.colberter.words import Bags, aggregate
from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole

POOLS = ("cls", "mean")


@dataclass(frozen=True)
class Colberter:
    """A retriever with one vector for each text, refined by one small vector for each word.

    Attributes:
        single: d_c, numbers of the single vector.
        tokens: d_t, numbers of a word (paper: 32, 16, 8).
        whole_words: one vector for each unique whole word, not for each sub-word.
        stopwords: gates that learn which of a passage's words to drop.
        second: numbers of a word after a second compression; 1 is Uni-ColBERTer. None has none.
        exact: only equal words match.
        learned_mix: gamma is trained; if not it stays 0, each score counting half.
        pool: the state that the single vector comes from: "cls", or "mean" of all tokens, for
            encoders that were trained so.

    Raises:
        InputError: a size is no integer or below 1, `second` isn't smaller than `tokens`, or pool
            is unknown.
    """

    single: int = 128
    tokens: int = 32
    whole_words: bool = True
    stopwords: bool = True
    second: int | None = None
    exact: bool = False
    learned_mix: bool = True
    pool: Literal["cls", "mean"] = "cls"

    def __post_init__(self) -> None:
        whole("Colberter", "single", self.single, least=1)
        whole("Colberter", "tokens", self.tokens, least=1)
        if self.second is not None:
            whole("Colberter", "second", self.second, least=1)
            if self.second >= self.tokens:
                raise InputError(
                    f"Colberter(second={self.second}): expected fewer than tokens={self.tokens}."
                )
        for name in ("whole_words", "stopwords", "exact", "learned_mix"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"Colberter({name}={getattr(self, name)!r}): expected a bool.")
        if self.pool not in POOLS:
            raise InputError(f"Colberter(pool={self.pool!r}): expected {' or '.join(POOLS)}.")

    @property
    def width(self) -> int:
        """Numbers of a word in the index."""
        return self.tokens if self.second is None else self.second

    def bytes_per_passage(self, words: int, *, number: int = 2) -> int:
        """Of one passage in an index: 2 d_c + words (2 d [+ 4 with exact match]).

        Args:
            words: that it keeps.
            number: bytes of a number; 2 is float16.
        """
        return number * self.single + words * (number * self.width + 4 * self.exact)

    def flops_per_pair(self, query: int, passage: int) -> int:
        """Of one score, every word against every word: 2 m n d + 2 d_c."""
        return 2 * query * passage * self.width + 2 * self.single

    def build(self, dim: int) -> ColberterHead:
        """The head for states of `dim` numbers."""
        return ColberterHead(self, whole("Colberter.build", "dim", dim, least=1))


class ColberterHead(nn.Module):
    """The head's weights.

    Args:
        recipe: its sizes.
        dim: H, of the encoder's states.

    Attributes:
        retrieval: W_CLS. compressor: W_t. stopwords: W_s and b_s, or None. second: W_u, or None.
        gamma: of the mixture, a scalar.
    """

    def __init__(self, recipe: Colberter, dim: int) -> None:
        super().__init__()
        self.recipe, self.dim = recipe, dim
        self.retrieval = nn.Linear(dim, recipe.single)
        self.compressor = nn.Linear(dim, recipe.tokens)
        self.stopwords = nn.Linear(recipe.tokens, 1) if recipe.stopwords else None
        self.second = (
            None if recipe.second is None else nn.Linear(recipe.tokens, recipe.second, bias=False)
        )
        self.gamma = nn.Parameter(torch.zeros(()), requires_grad=recipe.learned_mix)
        if self.stopwords is not None:
            nn.init.ones_(self.stopwords.bias)

    def forward(
        self,
        states: Tensor,
        bags: Bags,
        real: Tensor | None = None,
        *,
        passage: bool,
        drop: bool | None = None,
    ) -> Encoding:
        """Encode texts.

        Args:
            states: (B, L, H) of the encoder, the first token's first.
            bags: of the texts, whole words or sub-words as the recipe says.
            real: (B, L) bool, tokens that aren't padding; None has no padding. Read by "mean".
            passage: passages have gates, queries don't.
            drop: words with gate 0 don't count; default: not while training.

        Returns:
            The encoding; its vectors are gated.

        Raises:
            InputError: shapes or types don't fit.
        """
        self._check(states, bags, real)
        vectors = aggregate(self.compressor(states), bags)
        counts, gates = bags.real, None
        if passage and self.stopwords is not None:
            gates = torch.relu(self.stopwords(vectors)[..., 0])
            vectors = gates[..., None] * vectors
            if not self.training if drop is None else drop:
                counts = counts & (gates > 0)
        if self.second is not None:
            vectors = self.second(vectors)
        single = self.retrieval(self.pooled(states, real))
        return Encoding(single, vectors, bags.ids, counts, gates)

    def pooled(self, states: Tensor, real: Tensor | None = None) -> Tensor:
        """The state that the single vector is made of: (B, H)."""
        if self.recipe.pool == "cls":
            return states[:, 0]
        if real is None:
            return states.mean(1)
        kept = torch.where(real[..., None], states, 0.0).sum(1)
        return kept / real.sum(1, keepdim=True).clamp(min=1)

    def _check(self, states: Tensor, bags: Bags, real: Tensor | None) -> None:
        if states.dim() != 3 or states.shape[2] != self.dim or not states.shape[1]:
            raise InputError(
                f"ColberterHead: states have shape {tuple(states.shape)}; expected (B, L, "
                f"{self.dim}) with L of 1 or more."
            )
        if real is not None and (real.shape != states.shape[:2] or real.dtype != torch.bool):
            raise InputError(
                f"ColberterHead: real has shape {tuple(real.shape)} and {real.dtype}; expected "
                f"bool {tuple(states.shape[:2])}."
            )

    def scores(self, query: Encoding, passage: Encoding) -> tuple[Tensor, Tensor, Tensor]:
        """(s, s_CLS, s_token) of pairs of texts, (B) each; either side may be one text for all."""
        single = single_score(query, passage)
        token = token_score(query, passage, exact=self.recipe.exact)
        return mixed(single, token, self.gamma), single, token

    def loss(
        self,
        query: Encoding,
        better: Encoding,
        worse: Encoding,
        teacher_margin: Tensor,
        weights: Weights | None = None,
    ) -> dict[str, Tensor]:
        """The losses of triples, weighted; their sum is what is trained.

        Args:
            query, better, worse: of the triples' texts.
            teacher_margin: (B), T+ - T-.
            weights: default: the paper's, with or without stopwords.
        """
        if weights is None:
            weights = Weights() if self.stopwords is not None else Weights(1.0, 0.5, 0.0)
        up, down = self.scores(query, better), self.scores(query, worse)
        losses = {
            "both_loss": weights.both * margin_mse(up[0], down[0], teacher_margin),
            "cls_loss": weights.cls * margin_mse(up[1], down[1], teacher_margin),
        }
        if better.gates is not None and worse.gates is not None:
            gates = open_gates(better.gates, better.ids > 0)
            gates = gates + open_gates(worse.gates, worse.ids > 0)
            losses["stopword_loss"] = weights.stopwords * gates
        return losses
