"""ColBERTer: bags of whole words beside a single vector, for retrieval."""

from foveate.methods.colberter.head import Colberter, ColberterHead
from foveate.methods.colberter.losses import Weights, margin_mse, open_gates
from foveate.methods.colberter.score import (
    Encoding,
    best_matches,
    mixed,
    single_score,
    token_score,
    word_products,
)
from foveate.methods.colberter.words import (
    Bags,
    Words,
    aggregate,
    sub_words,
    whole_words,
    word_id,
)

__all__ = [
    "Bags",
    "Colberter",
    "ColberterHead",
    "Encoding",
    "Weights",
    "Words",
    "aggregate",
    "best_matches",
    "margin_mse",
    "mixed",
    "open_gates",
    "single_score",
    "sub_words",
    "token_score",
    "whole_words",
    "word_id",
    "word_products",
]
