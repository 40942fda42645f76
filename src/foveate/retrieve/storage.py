"""What an index takes on the disk, and what it would take at each of ColBERTer's reductions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from foveate.methods.colberter import Colberter
from foveate.models.whole_words import Tokens
from foveate.retrieve.collection import Passage

IDS = "ids.u32"


def facts_of(passages: Sequence[Passage], tokens: Sequence[Tokens]) -> dict[str, int]:
    """Counts of some passages: sub-words, unique words, bytes of text, and how many were cut.

    Sub-words are those that belong to a word: no special tokens.
    """
    return {
        "sub_words": sum(place >= 0 for one in tokens for place in one.words.place),
        "unique_words": sum(len(one.words.ids) for one in tokens),
        "text_bytes": sum(len(p.text.encode()) for p in passages),
        "cut": sum(one.cut for one in tokens),
    }


def storage(entries: Sequence[dict[str, Any]], recipe: Colberter, dim: int) -> dict[str, Any]:
    """Bytes a passage, deleted ones that are still on the disk included.

    Args:
        entries: the segments of an index.
        recipe: it was made with.
        dim: of the encoder's states.

    Returns:
        `passages`; `vectors`, mean vectors of a passage at each reduction; `bytes`, mean bytes of a
        passage: those of the files that the paper's formula counts (`measured`), that formula
        (`formula`), what each reduction takes, the text itself, and all files (`on_disk`).
    """
    passages = sum(entry["passages"] for entry in entries)
    if not passages:
        return {"passages": 0, "vectors": {}, "bytes": {}}
    counts = {
        name: sum(entry["facts"][name] for entry in entries)
        for name in ("sub_words", "unique_words", "text_bytes", "cut")
    }
    kept = sum(entry["words"] for entry in entries)
    files: dict[str, int] = {}
    for entry in entries:
        for name, written in entry["files"].items():
            files[name] = files.get(name, 0) + written["bytes"]
    measured = files["single.f16"] + files["words.f16"] + (files[IDS] if recipe.exact else 0)
    single, width, ids = 2 * recipe.single, 2 * recipe.width, 4 * recipe.exact
    token = 2 * recipe.tokens
    exact = " with ids" if recipe.exact else ""
    reduced = {
        f"sub-words at {dim}": 2 * dim * counts["sub_words"],
        f"sub-words at {recipe.tokens}": single * passages + token * counts["sub_words"],
        f"whole words at {recipe.tokens}": single * passages + token * counts["unique_words"],
        f"kept words at {recipe.width}{exact}": single * passages + kept * (width + ids),
        "single vector alone": single * passages,
    }  # fmt: skip
    formula = passages * single + kept * (width + ids)
    return {
        "passages": passages,
        "cut": counts["cut"],
        "vectors": {
            "sub-words": counts["sub_words"] / passages,
            "whole words": counts["unique_words"] / passages,
            "kept words": kept / passages,
        },
        "bytes": {
            "measured": measured / passages,
            "formula": formula / passages,
            **{name: value / passages for name, value in reduced.items()},
            "text": counts["text_bytes"] / passages,
            "on_disk": sum(files.values()) / passages,
        },
    }
