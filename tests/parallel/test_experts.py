"""Experts over ranks: what one process gives with the sequences of all."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
import experts  # noqa: E402
from experts import RANKS, ROUTERS  # noqa: E402

from foveate.parallel.spawn import run  # noqa: E402

CLOSE = {"atol": 1e-12, "rtol": 1e-9}


@pytest.fixture(scope="module")
def ranks():
    found = run(experts.on_ranks, [f"rank-{i}" for i in range(RANKS)], timeout=120)
    return [found[f"rank-{i}"] for i in range(RANKS)]


@pytest.fixture(scope="module", params=ROUTERS)
def pair(request, ranks):
    """Of one router: what the ranks found, and one process."""
    model = experts.model_of(request.param).eval()
    with torch.no_grad():
        logits = model(experts.tokens()).logits
    alone = experts.trained(model.train(), experts.tokens())
    alone |= {"logits": logits, "state": model.state_dict()}
    return [found[request.param] for found in ranks], alone


def test_outputs_are_those_of_one_process(pair):
    parts, alone = pair
    torch.testing.assert_close(torch.cat([p["logits"] for p in parts]), alone["logits"], **CLOSE)


def test_each_rank_holds_its_experts_and_sends_only_what_others_need(pair):
    parts, alone = pair
    assert [p["experts"][0] for p in parts] == [[0], [1, 2], [3, 4]]
    every = sum(
        v.numel()
        for n, v in alone["state"].items()
        if not n.endswith(("router.bias", "scores.done"))
    )
    for part in parts:
        held = sum(len(e) for e in part["experts"])
        assert part["numbers"] == every - (10 - held) * 3 * 16 * 12
        assert all(0 < sent <= 2 * 22 for sent in part["sent"])  # 22 tokens, 2 experts each


def test_training_takes_the_same_steps(pair):
    parts, alone = pair
    for step, loss in enumerate(alone["losses"]):
        mean = sum(p["losses"][step] for p in parts) / RANKS
        assert mean == pytest.approx(loss, rel=1e-10)
    for rank, part in enumerate(parts):
        torch.testing.assert_close(part["load"], alone["load"], **CLOSE)
        for name, grad in part["gradients"].items():
            wanted = alone["gradients"][name]
            if name.endswith(("feedforward.gate", "feedforward.up", "feedforward.down")):
                wanted = wanted[part["experts"][0]]
            torch.testing.assert_close(grad, wanted, **CLOSE, msg=f"{name} on rank {rank}")


def test_the_whole_model_comes_back(pair):
    parts, alone = pair
    for part in parts:
        assert set(part["state"]) == set(alone["state"])
        for name, value in part["state"].items():
            torch.testing.assert_close(value, alone["state"][name], **CLOSE)


@pytest.mark.parametrize("router", experts.PADDED)
def test_a_router_s_loss_counts_the_real_tokens_of_all_ranks(ranks, router):
    loss, grad, load = experts.losses_of(experts.model_of(router, False), router, slice(None))
    found = [rank["padded"][router] for rank in ranks]
    assert sum(f[0] for f in found) / RANKS == pytest.approx(loss, rel=1e-10)
    torch.testing.assert_close(sum(f[1] for f in found) / RANKS, grad, **CLOSE)
    for one in found:
        torch.testing.assert_close(one[2], load, **CLOSE)


def test_ranks_without_tokens_do_not_hang(ranks):
    for case in ("idle", "frozen"):
        assert [rank[case] for rank in ranks] == [[True, True], [True, True], [False, False]]


def test_encoders_too(ranks):
    wanted = experts.encoded(experts.encoder(), slice(None))
    torch.testing.assert_close(torch.cat([rank["encoder"] for rank in ranks]), wanted, **CLOSE)


def test_refusals(ranks):
    for rank in ranks:
        few, none = rank["refused"]
        assert "2 experts can't be dealt to 3 ranks" in few
        assert "no experts" in none
