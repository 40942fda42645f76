"""Whole models in combination: mixers, projections, routers, positions, sinks, padding and caches.

Any two choices meet in some case. Each is compared with the same weights in fp64, run on the whole
sequence without a cache; what is refused says why, in both.
"""

from __future__ import annotations

import copy

import pytest
import torch
from allpairspy import AllPairs

from foveate import catalog
from foveate.ops.errors import FoveateError

pytest.importorskip("transformers")
from foveate.models import FoveateConfig, FoveateForCausalLM  # noqa: E402

LENGTH, DIM, VOCAB, LAYERS = 22, 24, 50, 2
MIXERS = [row.key for row in catalog.rows() if row.kind == "mixer"]
SMALL = {
    "gaam": "gaam(form='density', heads=2)",
    "grassmann": "grassmann(rank=4, offsets=(1, 2, 5), dropout=0.0)",
    "rnd-emb-qk": "rnd-emb-qk(length=64, sigma=1.0)",
    "fixed-seq-qk": "fixed-seq-qk(length=64)",
}
MIXING = {
    **{key: {"mixer": SMALL.get(key, key)} for key in MIXERS},
    "gqa": {"projection": "gqa(kv_heads=2)"},
    "mla": {"projection": "mla(latent=16, rope_dim=4)"},
    "moh": {"projection": "moh(shared=1, active=2)"},
    "window": {"attention": "sink-window(sinks=2, window=7)"},
    "hybrid": {"mixer": ["grassmann(rank=4, offsets=(1, 2, 5), dropout=0.0)", None]},
}
ROUTERS = ["dense", *(row.key for row in catalog.rows() if row.kind == "router")]
POSITIONS = ("rope", "learned", "none")
NORMS = ("rms", "layer")
SINKS = {
    "none": {},
    "registers": {"registers": 2},
    "logits": {"sink_logits": "learned"},
    "key and value": {"kv_bias": "key-value"},
    "gate": {"gate": "element"},
}
PADDING = {"none": (0, 0), "left": (0, 5), "right": (0, -5)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CACHES = {"none": (LENGTH,), "token by token": (LENGTH - 3, 1, 1, 1), "in chunks": (9, 6, 7)}
CHOICES = [
    list(MIXING), ROUTERS, POSITIONS, NORMS, list(SINKS), list(PADDING), list(DTYPES), list(CACHES),
]  # fmt: skip
CASES = [tuple(case) for case in AllPairs(CHOICES)]


def built(case) -> FoveateForCausalLM | FoveateError:
    """The model, or why there is none."""
    mixing, router, position, norm, sinks, *_ = case
    given = {
        "vocab_size": VOCAB, "hidden_size": DIM, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "initializer_range": 0.3, "position": position, "norm": norm,
        "max_position_embeddings": 64, **MIXING[mixing], **SINKS[sinks],
    }  # fmt: skip
    if router != "dense":
        given |= {
            "moe_layers": [1], "num_experts": 4, "num_experts_per_tok": 2,
            "moe_intermediate_size": 16, "router": router, "router_renormalize": True,
        }  # fmt: skip
    torch.manual_seed(0)
    try:
        made = FoveateForCausalLM(FoveateConfig(**given)).eval()
    except FoveateError as error:
        return error
    stream = made.model.reference
    if stream is not None and stream.reference.kind == "tokens":
        made.set_reference(torch.randint(1, VOCAB, (64,)))
    return made


def tokens(padding: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (2, L) and which are real."""
    ids = torch.randint(1, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    at = torch.arange(LENGTH)
    real = torch.stack([at >= n if n >= 0 else at < LENGTH + n for n in PADDING[padding]])
    return torch.where(real, ids, 0), real


def answers(model, padding: str, cuts):
    """Logits (2, L, V), in as many calls as `cuts`, or why there are none."""
    ids, real = tokens(padding)
    mask = None if padding == "none" else real.long()
    try:
        if len(cuts) == 1:
            return model(ids, attention_mask=mask, use_cache=False).logits
        cache, found, done = model.model.new_cache(), [], 0
        for part in ids.split(cuts, 1):
            done += part.shape[1]
            seen = None if mask is None else mask[:, :done]
            found.append(model(part, attention_mask=seen, past_key_values=cache).logits)
        return torch.cat(found, 1)
    except FoveateError as error:
        return error


@torch.no_grad()
@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_any_two_choices_meet(case):
    *_, padding, dtype, cache = case
    model = built(case)
    if isinstance(model, FoveateError):
        assert len(str(model).split()) >= 8, model
        return
    twin = copy.deepcopy(model).double()
    want = answers(twin, padding, (LENGTH,))
    got = answers(model.to(DTYPES[dtype]), padding, CACHES[cache])
    if isinstance(want, FoveateError):
        assert type(got) is type(want), f"without a cache it is refused: {want}"
        assert len(str(want).split()) >= 8, want
        return
    assert not isinstance(got, FoveateError), f"refused with this cache or dtype alone: {got}"
    _, seen = tokens(padding)
    apart = (got.double() - want).norm(dim=-1) / want.norm(dim=-1)
    if dtype == "bf16":  # a choice of experts or heads may fall otherwise
        assert apart[seen].median() < 0.06
    else:
        assert apart[seen].max() < 1e-3


def test_few_are_refused():
    """So that nothing passes by refusals alone."""
    found: dict[object, list[bool]] = {}
    for case in CASES:
        works = not isinstance(built(case), FoveateError)
        for choice in case:
            found.setdefault(choice, []).append(works)
    assert all(any(works) for works in found.values())
    assert sum(w for works in found.values() for w in works) > 0.6 * sum(map(len, found.values()))
