"""How well an index answers judged questions, beside BM25 over the same texts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from foveate.ops.errors import InputError
from foveate.retrieve.bm25 import BM25
from foveate.retrieve.collection import Judged
from foveate.retrieve.index import WORKFLOWS, Index
from foveate.retrieve.measure import judge


def evaluate(
    index: Index,
    judged: Judged,
    candidates: int = 1000,
    tell: Callable[[float], None] = lambda share: None,
) -> dict[str, Any]:
    """nDCG@10 and recall@100 of each workflow that the index has, and of BM25.

    Args:
        index: open.
        judged: questions whose answers are named as the index names its passages.
        candidates: of each first stage.

    Returns:
        `questions`, how many; `found`, by workflow (and "BM25") the two figures; `storage`, as
        `Index.storage`.

    Raises:
        InputError: no question has an answer in the index.
    """
    rows = index.rows_of()
    kept = [
        (text, {rows[key]: gain for key, gain in gains.items() if key in rows})
        for text, gains in zip(judged.texts, judged.gains)
    ]
    kept = [(text, gains) for text, gains in kept if gains]
    if not kept:
        raise InputError(
            f"No judged question has an answer in {index.folder}; were the documents of the same "
            "collection indexed?"
        )
    workflows = [w for w in WORKFLOWS if w != "words-first" or index.exact]
    scores: dict[str, list[torch.Tensor]] = {name: [] for name in [*workflows, "BM25"]}
    alive = index.alive.nonzero()[:, 0]  # BM25 counts no text that was replaced
    bm25 = BM25.of([index.passage(row).text for row in alive.tolist()])
    for number, (text, _) in enumerate(kept):
        query = index.ask(text)
        for name in workflows:
            scores[name].append(index.scores(query, name, candidates)[0])
        nothing = torch.full((len(index.alive),), -torch.inf)
        scores["BM25"].append(nothing.index_put((alive,), bm25.scores(text)))
        tell((number + 1) / len(kept))
    gains = [gains for _, gains in kept]
    return {
        "questions": len(kept),
        "found": {name: judge(torch.stack(s), gains) for name, s in scores.items()},
        "storage": index.storage(),
    }
