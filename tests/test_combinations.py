"""`foveate.Attention` in combination: any two choices of its parts meet in some case.

Every case is built in fp32 (or bf16) and beside it in fp64, with the same weights, where the core
op runs on another backend: the engine against plain torch. A case that is refused says why, and is
refused in both.
"""

from __future__ import annotations

import copy

import pytest
import torch
from allpairspy import AllPairs
from torch import Tensor

import foveate
from foveate import Context, catalog, causal, padding, window
from foveate.ops.errors import FoveateError

DIM, HEADS, LENGTH = 48, 4, 40
PROJECTIONS = {row.key: row.key for row in catalog.rows() if row.kind == "projection"} | {
    "gqa": "gqa(kv_heads=2)",
    "sqa": "sqa(query_heads=2, kv_heads=1)",
    "mfa": "mfa(head_dim=16, query_rank=16)",
    "mfa-kr": "mfa-kr(head_dim=16, query_rank=16)",
    "mla": "mla(latent=16, rope_dim=4)",
    "tpla": "tpla(latent=16, rope_dim=4, pd_sep=False)",
    "moh": "moh(shared=1, active=2)",
}
ATTENTIONS = {
    row.key: row.key for row in catalog.rows() if row.kind in ("pattern", "attention")
} | {  # budgets that leave something out at this length
    "sink-window": "sink-window(sinks=2, window=12)",
    "a-shape": "a-shape(sinks=2, local=8)",
    "tri-shape": "tri-shape(sinks=2, local=8, bottom=4)",
    "vertical-slash": "vertical-slash(verticals=6, slashes=12, last=8, forced_slashes=8)",
    "grid": "grid(max_stride=5)",
    "q-boundary": "q-boundary(patterns=['grid(max_stride=5)'])",
    "2d-boundary": "2d-boundary(patterns=[['grid(max_stride=5)']])",
    "block-sparse": "block-sparse(blocks=2, tile=8)",
    "gna": "gna(window=8, stride=4)",
    "moba": "moba(block=8, topk=2)",
    "biformer": "biformer(regions=4, topk=2)",
    "dhsa": "dhsa(budget=16, block=8, local=8, sinks=2, instruction=4, chunk=8)",
    "flux": "flux(sinks=2, local=8, block=8, route='sparse')",
    "hyperattention": "hyperattention(block_size=8, sample_size=8, min_seq_len=16)",
    "rectified-spaattn": "rectified-spaattn(block=8, drop=0.5, shape=(2, 4, 5))",
    "vmoba": "vmoba(frames=1, tile=(2, 2), box=(1, 2, 5), shape=(2, 4, 5))",
    "hsa": "hsa(branch=4)",
    "echoatt": "echoatt(followers=[1])",  # this layer leads
    "dma": "dma(window=8)",
    "superlinear": "superlinear(spans=2)",
    "routing-transformer": "routing-transformer(clusters=4, window=10, block=8)",
    "sea": "sea(k=8, width=16, max_length=64)",
    "combiner": "combiner(size=8)",
    "lucid": "lucid(block=16)",
    "flowformer": "flowformer(chunk=8)",
    "deconstructed-approximate": "deconstructed-approximate(chunk=8)",
    "drrl": "drrl(control='fixed', rank=8, r_min=4, r_max=12, step=4, segment=16)",
}
POSITIONS = ("rope", "none")
MASKS = ("everyone", "causal", "window", "left padding", "right padding")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Numbers of new tokens, call by call; None is no cache.
CACHES = {
    "none": None,
    "token by token": [LENGTH - 4, 1, 1, 1, 1],
    "in chunks": [16, 11, 13],
    "reordered": [LENGTH - 2, 1, 1],
}
PADS = torch.tensor([0, 7])
CHOICES = [sorted(PROJECTIONS), sorted(ATTENTIONS), POSITIONS, MASKS, list(DTYPES), list(CACHES)]
CASES = [tuple(case) for case in AllPairs(CHOICES)]


def known(mask: str, n: int, new: int) -> Context:
    """What a call knows whose last `new` of n tokens are its queries."""
    if mask == "everyone":
        return Context()
    if mask == "causal":
        return Context(mask=causal())
    if mask == "window":
        return Context(mask=causal() & window(9, 0))
    if mask == "right padding":
        return Context(mask=causal() & padding((LENGTH - PADS).clamp(max=n)))
    at = torch.arange(n) - PADS[:, None]
    return Context(mask=causal() & padding(n - PADS), q_positions=at[:, n - new :], kv_positions=at)


def real(mask: str) -> Tensor:
    """(B, L) bool: the tokens that aren't padding."""
    at = torch.arange(LENGTH)
    if mask == "left padding":
        return at >= PADS[:, None]
    if mask == "right padding":
        return at < (LENGTH - PADS)[:, None]
    return at.expand(2, -1) >= 0


def answers(layer: foveate.Attention, x: Tensor, mask: str, cache: str) -> Tensor:
    """y (B, L, DIM), in as many calls as the case says."""
    calls = CACHES[cache]
    if calls is None:
        return layer(x, ctx=known(mask, LENGTH, LENGTH)).y
    kept, found, n = layer.new_cache(), [], 0
    for number, new in enumerate(calls):
        ctx = known(mask, n + new, new)
        ctx.phase = "decode" if n else "prefill"
        y, kept, _ = layer(x[:, n : n + new], cache=kept, ctx=ctx)
        found.append(y)
        n += new
        if cache == "reordered" and number == 0:  # swapped, and back
            kept.reorder(torch.tensor([1, 0]))
            kept.reorder(torch.tensor([1, 0]))
    return torch.cat(found, 1)


def run(layer, x, mask, cache):
    """The answers, or why there are none."""
    torch.manual_seed(3)
    try:
        return answers(layer, x, mask, cache)
    except FoveateError as error:
        return error


def built(case) -> foveate.Attention:
    projection, attention, position, *_ = case
    torch.manual_seed(1)
    return foveate.Attention(
        DIM, HEADS, PROJECTIONS[projection], ATTENTIONS[attention], position
    ).eval()


def rows_apart(got: Tensor, want: Tensor, seen: Tensor) -> Tensor:
    """Relative error of each real row."""
    error = (got.double() - want).norm(dim=-1) / want.norm(dim=-1).clamp(min=1e-2)
    return error[seen]


@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_any_two_choices_meet(case):
    projection, attention, _, mask, dtype, cache = case
    try:
        layer = built(case)
    except FoveateError as error:
        reason(error, case)
        return
    x = torch.randn(2, LENGTH, DIM, generator=torch.Generator().manual_seed(2))
    layer, x = layer.to(DTYPES[dtype]), x.to(DTYPES[dtype])
    twin, exact = copy.deepcopy(layer).double(), x.double()
    if cache == "none" and dtype == "fp32":
        x.requires_grad_(), exact.requires_grad_()
    got, want = run(layer, x, mask, cache), run(twin, exact, mask, cache)
    if isinstance(want, FoveateError):
        assert type(got) is type(want), f"fp64 is refused: {want}"
        reason(want, case)
        return
    assert not isinstance(got, FoveateError), f"refused in {dtype} alone: {got}"
    seen = real(mask)
    assert got.shape == (2, LENGTH, DIM)
    assert torch.isfinite(got[seen]).all()
    apart = rows_apart(got, want, seen)
    if dtype == "bf16":  # a choice may fall otherwise at a tie, in a few rows
        assert apart.median() < 0.03
        return
    assert apart.max() < 2e-4
    if x.requires_grad:
        weight = torch.randn(2, LENGTH, DIM, generator=torch.Generator().manual_seed(4))
        (grad,) = torch.autograd.grad((got * weight)[seen].sum(), x)
        (right,) = torch.autograd.grad((want * weight)[seen].sum(), exact)
        assert rows_apart(grad, right, seen).max() < 2e-3


def reason(error: FoveateError, case) -> None:
    """A refusal is a sentence that names the attention, the projection, or what doesn't go."""
    text = str(error)
    assert len(text.split()) >= 8, text
    refused = type(error) is not FoveateError
    assert refused, f"{type(error).__name__} is no refusal: {text}"


@pytest.mark.parametrize("projection", sorted(PROJECTIONS))
def test_plain_attention_is_never_refused(projection):
    """So that no projection passes the cases above by refusals alone."""
    for mask in MASKS:
        for cache in CACHES:
            case = (projection, "full", "rope", mask, "fp32", cache)
            layer = built(case)
            x = torch.randn(2, LENGTH, DIM, generator=torch.Generator().manual_seed(2))
            whole = run(layer, x, mask, "none")
            assert isinstance(whole, Tensor), whole
            if mask == "everyone":
                continue  # earlier tokens of a cache don't see later ones
            assert rows_apart(run(layer, x, mask, cache), whole.double(), real(mask)).max() < 2e-4


@pytest.mark.parametrize("attention", sorted(ATTENTIONS))
def test_every_attention_runs_on_plain_heads(attention):
    """Or keeps nothing in this layer and says so; nothing passes by refusals alone."""
    x = torch.randn(2, LENGTH, DIM, generator=torch.Generator().manual_seed(2))
    case = ("mha", attention, "rope", "causal", "fp32", "none")
    needs = {"h2o": "foveate.use", "snapkv": "foveate.use", "mminference": "foveate fit"}
    if attention in needs:
        with pytest.raises(FoveateError, match=needs[attention]):
            answers(built(case), x, "causal", "none")
        return
    row = catalog.get(attention)
    mask = "causal" if row.capabilities.causal_outputs.works else "everyone"
    assert isinstance(answers(built(case), x, mask, "none"), Tensor)
