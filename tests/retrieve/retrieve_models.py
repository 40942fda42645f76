"""A tiny encoder in a folder, documents for it, and an index made slowly enough to be killed."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

TEXT = (
    "heart muscle cells beat when calcium flows into them and rest as it leaves again virus "
    "infects lung tissue but antibodies bind protein shells so fever falls stars burn "
    "hydrogen until iron core collapses then light fades over years rivers carry sand down to "
    "sea where deltas grow slowly from mud"
)
WORDS = [*TEXT.split()]


def encoder(folder: Path) -> Path:
    """Write a BERT of 2 layers whose vocabulary is `WORDS`, with "##s" and "##ing"."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "##s", "##ing", ".", ","]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*pieces, *WORDS]))}
    made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]",
        sep_token="[SEP]",
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertModel(
            BertConfig(
                vocab_size=len(vocabulary), hidden_size=24, num_hidden_layers=2,
                num_attention_heads=2, intermediate_size=32, max_position_embeddings=64,
            )
        )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def documents(folder: Path, count: int = 24, seed: int = 0) -> Path:
    """Write a corpus of `count` documents with titles."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = torch.Generator().manual_seed(seed)

    def text(words: int) -> str:
        at = torch.randint(len(WORDS), (words,), generator=draw).tolist()
        return " ".join(WORDS[i] + ("s" if i % 3 == 0 else "") for i in at)

    lines = [
        json.dumps({"_id": f"d{i}", "title": text(4), "text": f"{text(9)}. {text(5 + i % 7)}."})
        for i in range(count)
    ]
    (folder / "corpus.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def job(folder: Path, **settings):
    """Of an index in `folder/index`, of the documents beside it."""
    from foveate.methods.colberter import Colberter
    from foveate.retrieve.build import Job
    from foveate.retrieve.fit import Plan

    recipe = settings.pop("recipe", Colberter(single=8, tokens=4, pool="mean"))
    plan = settings.pop("plan", Plan(steps=3, batch=4, negatives=4, lexical=0.5))
    return Job(
        folder / "documents", folder / "index", recipe=recipe, encoder=str(folder / "encoder"),
        plan=plan, length=32, batch=4, per=4, **settings,
    )  # fmt: skip


if __name__ == "__main__":  # index slowly: a line for each step, and a wait
    from foveate.retrieve.build import run

    def tell(share: float, doing: str) -> None:
        print(f"{share:.3f} {doing}", flush=True)
        if doing == "encoding":
            time.sleep(float(sys.argv[2]))

    run(job(Path(sys.argv[1])), tell)
