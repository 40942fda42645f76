"""Routing over a training: the watcher against its definitions, its memory, and `foveate train`."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("transformers")
from foveate.cli import main  # noqa: E402
from foveate.ops.errors import InputError  # noqa: E402
from foveate.papers.tasks.text import ByteText  # noqa: E402
from foveate.papers.training.experts import Experts  # noqa: E402
from foveate.papers.training.language import Sizes, language_model  # noqa: E402
from foveate.papers.training.loop import train  # noqa: E402
from foveate.papers.training.regime import Regime  # noqa: E402
from foveate.papers.training.routing import RoutingWatch  # noqa: E402

TEXT = ByteText(b"The quick brown fox jumps over the lazy dog, and the dog sleeps. " * 80, 32)
SIZES = Sizes(2, 32, 4, 32)


def model_of(router="similarity-smoe", seed=0):
    torch.manual_seed(seed)
    return language_model(SIZES, **Experts(4, 2, router).fields(2, 32))


def by_definition(model, inputs):
    """Per layer: rbar and the sets, from hooks of this test's own."""
    found = []
    hooks = [
        layer.feedforward.router.register_forward_hook(lambda *a: found.append(a[2]))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model.eval()(inputs)
    for hook in hooks:
        hook.remove()
    return [(r.probs.reshape(-1, 4).double(), r.chosen.reshape(-1, 4)) for r in found]


def test_figures_are_those_of_the_definitions():
    watch = RoutingWatch(TEXT, sequences=4)
    first, second = model_of(seed=0), model_of(seed=1)
    assert "routing_set_changed" not in watch(first.train(), 10)
    assert first.training
    found = watch(second, 20)
    before, after = (by_definition(m, watch.inputs) for m in (first, second))
    h = sum(-(p * p.log()).sum(-1).mean() for p, _ in after) / 2
    assert found["routing_entropy"] == pytest.approx(h.item())
    assert found["routing_entropy_share"] == pytest.approx(
        h.item() / torch.tensor(4.0).log().item()
    )
    counts = [c.double().sum(0) for _, c in after]
    uneven = sum(c.std(unbiased=False) / c.mean() for c in counts) / 2
    assert found["load_unevenness"] == pytest.approx(uneven.item())
    pairs = list(zip(before, after))
    best = sum((p.argmax(1) != q.argmax(1)).double().mean() for (p, _), (q, _) in pairs) / 2
    sets = sum((c != d).any(1).double().mean() for (_, c), (_, d) in pairs) / 2
    assert found["routing_best_changed"] == pytest.approx(best.item())
    assert found["routing_set_changed"] == pytest.approx(sets.item())
    assert 0 < sets <= 1
    assert watch.to_the_end()[10].chosen == pytest.approx(sets.item())


def test_padding_is_not_looked_at():
    watch = RoutingWatch(TEXT, sequences=4, padding=32)  # a space, here
    figures, choices = watch.look(model_of())
    assert choices["best"].shape == (2, int((watch.inputs != 32).sum()))
    assert RoutingWatch(TEXT, sequences=4).look(model_of())[0] != figures


def test_a_training_that_was_stopped_ends_with_the_same_figures(tmp_path):
    def run(folder, steps, stop=None):
        model, watch = model_of(), RoutingWatch(TEXT, folder, sequences=4)
        calls = []

        def watched(*given):
            if stop is not None and given[1] > stop:
                raise KeyboardInterrupt
            calls.append(given[1])
            return watch(*given)

        regime = Regime(steps=steps, batch=4, every=2, lr=1e-2)
        return train(model, TEXT, regime, folder=folder, watch=watched), watch, calls

    whole, watch, _ = run(tmp_path / "whole", 6)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", 6, stop=4)
    again, resumed, calls = run(tmp_path / "cut", 6)
    assert calls == [6]
    assert again.history == whole.history
    assert resumed.to_the_end() == watch.to_the_end()
    assert list(watch.to_the_end()) == [2, 4]


def test_a_growing_router_hears_how_far_the_training_is():
    model = model_of("smoe-dropout")
    router = model.model.layers[0].feedforward.router
    seen = []
    model.register_forward_pre_hook(lambda m, _: seen.append(router.active) if m.training else None)
    train(model, TEXT, Regime(steps=6, batch=2, every=6))
    assert seen[0] == 2
    assert seen == sorted(seen)
    assert router.active == 4


def test_a_dense_model_has_nothing_to_watch():
    with pytest.raises(InputError, match="no router"):
        RoutingWatch(TEXT, sequences=2)(language_model(SIZES), 1)


def test_train_tells_routing_and_draws_it(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    data = tmp_path / "text.txt"
    data.write_bytes(TEXT.content)
    small = ["train", "--steps", "4", "--every", "2", "--layers", "1", "--dim", "32",
             "--heads", "4", "--length", "32", "--batch", "2",
             "--data", str(data), "--out", str(tmp_path / "m"),
             "--experts", "3", "--router", "attention-smoe"]  # fmt: skip
    assert main([*small, "--json"]) == 0
    facts = json.loads(capsys.readouterr()[0])
    assert facts["experts"] == {"count": 3, "top_k": 2, "router": "attention-smoe"}
    assert set(facts["routing"]["changed_to_the_end"]) == {"2"}
    assert (tmp_path / "m" / "routing.png").stat().st_size > 10_000
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (config["router"], config["moe_layers"]) == ("attention-smoe", [0])
    assert main([*small, "--resume"]) == 0
    assert "2 of 3 experts by attention-smoe" in " ".join(capsys.readouterr()[0].split())


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--router", "xmoe"), "--experts"),
        (("--experts", "2", "--top-k", "3"), "where there are 2"),
        (("--experts", "2", "--router", "mha"), "no router"),
        (("--experts", "2", "--like", "step3"), "--experts"),
    ],
)
def test_train_refuses_experts_that_make_no_sense(capsys, tmp_path, more, said):
    assert main(["train", "--out", str(tmp_path / "m"), *more]) == 2
    assert said in " ".join(capsys.readouterr()[1].split())
