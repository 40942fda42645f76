"""Every scheme on ranks that are threads of this process, against the reference op on one rank."""

from __future__ import annotations

import gc
import time

import pytest
import torch
from sequences import any_layouts, check_equal, on_ranks, one_rank, problem, this_rank

from foveate.ops import attention, blocks, causal, documents, padding, prefix, sinks, window
from foveate.ops.errors import InputError
from foveate.parallel.context import (
    AllGather,
    ContextParallel,
    Ring,
    Ulysses,
    by_work,
    run_local,
    scheme_of,
    zigzag,
)
from foveate.parallel.context.rule import LayoutRule

LENGTH = 203  # divides by none of the numbers of ranks
BOUNDS = (0, 37, 38, 140, 203)
MASKS = {
    "full": None,
    "causal": causal(),
    "document": causal() & documents(BOUNDS),
    "full-document": documents(BOUNDS),
    "sliding": causal() & (window(19, 0) | sinks(3)),
    "prefix": causal() | prefix(50),
    "empty-rows": causal() & ~window(30, -1),
}
SCHEMES = [
    (2, "ring"), (4, "ring"), (4, "ring(window=2)"), (4, "ring(window=1)"),
    (3, "ring(overlap=False)"), (2, "all-gather"), (4, "all-gather(groups=2)"),
    (2, "ulysses"), (4, "ulysses"),
    (4, "usp(ulysses=2)"), (4, "usp(ulysses=2, placement='context')"),
    (8, "loongtrain(ulysses=2, window=2)"), (3, "magi"), (4, "magi(stages=2)"), (1, "ring"),
]  # fmt: skip


SHARDINGS = ["contiguous", "zigzag", "striped", "by-work(16)", "document-zigzag"]


@pytest.fixture(scope="module")
def answers():
    """One rank's answers to all masks, computed once."""
    p = problem(LENGTH)
    return p, {name: one_rank(p, mask) for name, mask in MASKS.items()}


@pytest.mark.parametrize(("ranks", "scheme"), SCHEMES)
def test_oracle_1_schemes_equal_one_rank(ranks, scheme, answers):
    """Each scheme with every mask, and over the schemes each mask with every sharding."""
    p, want = answers
    first = SCHEMES.index((ranks, scheme))
    for number, (name, mask) in enumerate(MASKS.items()):
        sharding = SHARDINGS[(first + number) % 5]
        found = on_ranks(ranks, p, scheme, sharding, mask)
        check_equal(found, want[name], torch.float64)


@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (8, 2), (6, 3)])
def test_oracle_1_ratios_of_heads(heads):
    p = problem(70, heads)
    want = one_rank(p, causal())
    for ranks, scheme in ((2, "ulysses"), (2, "ring"), (4, "usp(ulysses=2)"), (2, "magi")):
        found = on_ranks(ranks, p, scheme, "zigzag", causal())
        check_equal(found, want, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_oracle_1_other_precisions(dtype):
    p = problem(150, dim=(32, 32), dtype=dtype)
    mask = causal() & documents([0, 60, 150])
    want = one_rank(p, mask)
    for ranks, scheme in ((4, "ring"), (2, "ulysses"), (4, "usp(ulysses=2)"), (4, "magi"),
                          (2, "all-gather")):  # fmt: skip
        found = on_ranks(ranks, p, scheme, "zigzag", mask)
        check_equal(found, want, dtype)


def test_masks_that_differ_by_head_and_batch_entry():
    p = problem(96)
    table = torch.rand(4, 12, 12) < 0.5
    for mask in (blocks(table, 8), causal() & padding([96, 41]), blocks(table[:2], 8) & causal()):
        want = one_rank(p, mask)
        for ranks, scheme in ((4, "ulysses"), (4, "usp(ulysses=2)"), (2, "all-gather(groups=2)"),
                              (3, "magi")):  # fmt: skip
            found = on_ranks(ranks, p, scheme, "zigzag", mask)
            check_equal(found, want, torch.float64)


def test_any_layout_is_shared_out():
    p = problem(96)
    for name, layout in any_layouts().items():
        want = one_rank(p, layout=layout)
        for ranks, scheme, sharding in ((4, "ring", "zigzag"), (4, "ulysses", "contiguous"),
                                        (3, "magi(stages=2)", "by-work(8)"),
                                        (2, "all-gather(groups=2)", "striped")):  # fmt: skip
            found = on_ranks(ranks, p, scheme, sharding, layout=layout)
            try:
                check_equal(found, want, torch.float64)
            except AssertionError as error:
                raise AssertionError(f"{name}, {scheme}: {error}") from error


def test_what_a_restricted_layout_visits():
    for layout in any_layouts().values():
        rows, cols = torch.randperm(96)[:40], torch.randperm(96)[:33]
        small = LayoutRule(layout).part(rows, cols).layout.checked()
        assert torch.equal(small.dense(), layout.dense()[:, :, rows][..., cols])


@pytest.mark.parametrize("length", [1, 3, 5])
def test_fewer_tokens_than_ranks(length):
    p = problem(length)
    for scheme in ("ring", "all-gather", "ulysses", "usp(ulysses=2)", "magi", "ring(window=2)"):
        for sharding in ("zigzag", "striped", "by-work"):
            check_equal(
                on_ranks(4, p, scheme, sharding, causal()), one_rank(p, causal()), torch.float64
            )


def test_inputs_with_strides_of_their_own():
    p = problem(40)
    wide = {n: x.transpose(1, 2).contiguous().transpose(1, 2) for n, x in p.items() if n != "dlse"}
    found = on_ranks(2, wide | {"dlse": p["dlse"]}, "usp(ulysses=2)", "zigzag", causal())
    check_equal(found, one_rank(p, causal()), torch.float64)


def test_one_of_two_gradients_is_enough():
    """A loss of the output alone, and one of the lse alone."""
    p = problem(40)
    for name in ("dout", "dlse"):
        some = p | {name: torch.zeros_like(p[name])}
        for scheme in ("ring", "ulysses"):
            check_equal(
                on_ranks(2, some, scheme, "zigzag", causal()), one_rank(some, causal()),
                torch.float64,
            )  # fmt: skip

    def work(links):
        sequence = ContextParallel(links, "ulysses").sequence(40, causal())
        q, k, v = (sequence.split(p[n], 2).requires_grad_() for n in "qkv")
        lse = sequence.attention(q, k, v).lse
        return torch.autograd.grad(lse.sum(), (q, k))

    q, k = (p[n].clone().requires_grad_() for n in "qk")
    lse = attention(q, k, p["v"], causal(), backend="reference").lse
    want = torch.autograd.grad(lse.sum(), (q, k))
    found = run_local(2, work)
    whole = zigzag(40, 2)
    for i in range(2):
        got = whole.join([f[i] for f in found], 2)
        torch.testing.assert_close(got, want[i], rtol=0, atol=1e-12)


def test_options_of_the_op():
    p = problem(64)
    sinks_of = torch.randn(4, dtype=torch.float64)
    for options in ({"scale": 0.3}, {"softcap": 2.0}, {"sink_logits": sinks_of}):
        found = on_ranks(2, p, "ring", "zigzag", causal(), **options)
        check_equal(found, one_rank(p, causal(), **options), torch.float64)


def test_positions_of_a_batch_that_is_padded_in_front():
    p = problem(64)
    at = torch.arange(64) - torch.tensor([[0], [13]])
    mask = causal() & padding([64, 51])
    dense = mask.dense(64, 64, q_positions=at, kv_positions=at)
    want = one_rank(p, blocks(dense, 1))
    found = on_ranks(4, p, "ring", "zigzag", mask, positions=at)
    check_equal(found, want, torch.float64)


def test_another_mask_for_the_same_tokens():
    """Positions stay; a layout doesn't, and without a mask everyone is seen."""
    p = problem(64)
    at = torch.arange(64) - torch.tensor([[0], [13]])
    mask = causal() & padding([64, 51]) & window(9, 0)
    dense = mask.dense(64, 64, q_positions=at, kv_positions=at)

    def work(links, other, **given):
        sequence = ContextParallel(links, "ring", "zigzag").sequence(64, **given)
        return sequence.gather(
            sequence.under(other).attention(*(sequence.split(p[n], 2) for n in "qkv")).out, 2
        )

    given = {"mask": causal() & padding([64, 51]), "positions": at}
    got = run_local(2, lambda links: work(links, mask, **given))[0]
    want = one_rank(p, blocks(dense, 1))["out"]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    layout = causal().layout(64, 64, 16)
    got = run_local(2, lambda links: work(links, None, layout=layout))[0]
    torch.testing.assert_close(got, one_rank(p)["out"], rtol=0, atol=1e-12)


# -- refusals -------------------------------------------------------------------------------------
def refused(match, ranks, scheme, **options):
    def work(links):
        p = problem(32, (6, 3))
        return this_rank(links, p, scheme, options.pop("sharding", "zigzag"), causal(), **options)

    with pytest.raises(InputError, match=match):
        run_local(ranks, work)


def test_refusals_say_why():
    refused("query heads that 4 divides", 4, "ulysses")
    refused("divide the 4 ranks", 4, "usp(ulysses=3)")
    refused("don't divide a ring", 4, "ring(window=3)")
    refused("is not known", 1, "rng")
    refused("sharding 'zagzig'", 1, "ring", sharding="zagzig")
    refused("no attention dropout", 1, "ring", dropout=0.1)
    refused("takes no bias", 1, "ring", bias=torch.zeros(1))
    refused("loongtrain needs window", 2, "loongtrain(ulysses=2)")
    with pytest.raises(InputError, match="torchrun"):
        ContextParallel(None)
    with pytest.raises(InputError, match="fewer than the 8 ranks"):
        by_work(torch.ones(64), 8, 16)


def test_schemes_are_read_from_their_names():
    text = "loongtrain(ulysses=2, window=4, overlap=False, placement='context')"
    want = Ulysses(2, Ring(4, overlap=False), "context")
    assert scheme_of(text) == want
    assert scheme_of("ring(window=None)") == Ring()
    assert scheme_of("all-gather( groups = 2, )") == AllGather(2)
    for wrong in ("ring(2)", "ring(window=2", "ring(window=x)", "ring(window=2.5)", "ring(window)",
                  "ring(width=2)", "usp()", "usp(ulysses='2')"):  # fmt: skip
        with pytest.raises(InputError):
            scheme_of(wrong)


def test_schemes_are_read_in_threads():
    """Python 3.11's own parser breaks when another thread parses while its objects are made."""
    text = "loongtrain(ulysses=2, window=4, overlap=False, placement='context')"
    before = gc.get_threshold()

    def elsewhere(*_):
        time.sleep(1e-4)  # another thread's turn

    gc.callbacks.append(elsewhere)
    gc.set_threshold(7)
    try:
        run_local(4, lambda links: [scheme_of(text) for _ in range(200)])
    finally:
        gc.set_threshold(*before)
        gc.callbacks.remove(elsewhere)


def test_a_rank_that_raises_stops_the_others():
    def work(links):
        if links.rank == 1:
            raise ValueError("rank 1 is broken")
        return this_rank(links, problem(32), "ring", "zigzag", causal())

    with pytest.raises(ValueError, match="rank 1 is broken"):
        run_local(3, work)
