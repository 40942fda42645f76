"""Models whose sequences lie on several ranks, alone and under FSDP2 and DDP."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from foveate.models import FoveateConfig, FoveateForCausalLM
from foveate.nn import advance
from foveate.ops import documents
from foveate.ops.errors import InputError
from foveate.parallel.context import ContextParallel, run_local, use
from foveate.parallel.spawn import Place, run

LENGTH, BOUNDS = 30, (0, 11, 30)


def ours(attention: str = "full", **options) -> FoveateForCausalLM:
    torch.manual_seed(3)
    config = FoveateConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, projection="gqa(kv_heads=2)", attention=attention,
        **options,
    )  # fmt: skip
    return FoveateForCausalLM(config).train()


def theirs() -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(3)
    config = MistralConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, sliding_window=9, attn_implementation="eager",
    )  # fmt: skip
    return MistralForCausalLM(config).train()


def ids(batch: int = 2) -> torch.Tensor:
    return torch.randint(64, (batch, LENGTH), generator=torch.Generator().manual_seed(1))


def step(model: nn.Module, tokens: torch.Tensor, **more) -> tuple[torch.Tensor, dict, torch.Tensor]:
    labels = tokens.clone()
    labels[0, :7] = -100
    out = model(input_ids=tokens, labels=labels, **more)
    out.loss.backward()
    return out.loss.detach(), {n: p.grad for n, p in model.named_parameters()}, out.logits.detach()


def positions() -> torch.Tensor:
    return torch.cat([torch.arange(b - a) for a, b in zip(BOUNDS, BOUNDS[1:])])[None]


NO_SINKS = {"sink_logits": "learned", "kv_bias": "key-value", "gate": "element"}
CASES = {
    "ours": (ours, {}, None),
    "ours, without sinks": (lambda: ours(**NO_SINKS), {}, None),
    "ours, sinks and window": (lambda: ours("sink-window(sinks=2, window=8)"), {}, None),
    "ours, packed": (ours, {"position_ids": positions()}, None),
    "theirs, sliding": (theirs, {}, None),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scheme", ["ring", "ulysses"])
def test_a_step_over_ranks_is_one_ranks(case, scheme):
    make, more, mask = CASES[case]
    tokens = ids(1 if more else 2)
    loss, grads, logits = step(make(), tokens, **more)

    models = [make() for _ in range(2)]  # here: threads share torch's random state

    def work(links):
        model = models[links.rank]
        with use(model, ContextParallel(links, scheme, "zigzag"), mask=mask) as used:
            found = step(model, tokens, **more)
            return *found, used.sequence.gather(found[2])

    found = run_local(2, work)
    torch.testing.assert_close(sum(f[0] for f in found) / 2, loss, rtol=1e-5, atol=1e-6)
    for name, right in grads.items():
        mean = sum(f[1][name] for f in found) / 2
        torch.testing.assert_close(mean, right, rtol=1e-4, atol=1e-5)
    for one in found:
        torch.testing.assert_close(one[3], logits, rtol=1e-4, atol=1e-5)


def test_packing_by_mask_equals_packing_by_positions():
    tokens, models = ids(1), [theirs() for _ in range(3)]

    def work(links, more, mask):
        model = models[links.rank]
        with use(model, ContextParallel(links, "ring", "document-zigzag"), mask=mask) as used:
            logits = model(input_ids=tokens, **more).logits
            return used.sequence.gather(logits)

    alone = theirs()
    parts = [alone(input_ids=tokens[:, a:b]).logits for a, b in zip(BOUNDS, BOUNDS[1:])]
    for more in ({}, {"position_ids": positions()}):
        mask = None if more else documents(BOUNDS)
        got = run_local(3, partial(work, more=more, mask=mask))[0]
        torch.testing.assert_close(got, torch.cat(parts, 1), rtol=1e-4, atol=1e-5)


def test_a_model_is_put_back():
    model = ours()
    before = model(input_ids=ids()).logits
    run_local(1, lambda links: use(model, ContextParallel(links)).undo())
    assert torch.equal(model(input_ids=ids()).logits, before)


def test_refusals_name_what_cant_run():
    def on_one(model, **call):
        def work(links):
            with use(model, ContextParallel(links)):
                return model(**({"input_ids": ids()} | call))

        return run_local(1, work)

    with pytest.raises(InputError, match="VerticalSlash"):
        on_one(ours("vertical-slash"))
    with pytest.raises(InputError, match="register tokens"):
        on_one(ours(registers=1))
    with pytest.raises(InputError, match="without a cache"):
        on_one(ours(), use_cache=True)
    with pytest.raises(InputError, match="padding behind"):
        on_one(ours(), attention_mask=torch.tensor([[0] * 3 + [1] * (LENGTH - 3)] * 2))


def test_losses_of_routers_are_refused():
    """A load-balance loss is no sum over tokens; without it experts run as on one rank."""

    def made(balance, router="top-k"):
        torch.manual_seed(3)
        config = FoveateConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=48, moe_layers=[1], num_experts=4, num_experts_per_tok=2,
            moe_intermediate_size=16, router_balance=balance, router=router,
        )  # fmt: skip
        return FoveateForCausalLM(config)

    def frozen():
        model = made(0.0, "stable-moe").train()
        advance(model, 0.5)
        return model

    def on_two(make, **call):
        models = [make() for _ in range(2)]

        def work(links):
            with use(models[links.rank], ContextParallel(links)) as used:
                found = models[links.rank](input_ids=ids(), **call).logits.detach()
                return used.sequence.gather(found)

        return run_local(2, work)[0]

    with pytest.raises(InputError, match="router_balance=0"):
        on_two(lambda: made(0.1).train())
    with pytest.raises(InputError, match="learns to choose"):
        on_two(lambda: made(0.0, "stable-moe").train())
    for make in (lambda: made(0.1).eval(), lambda: made(0.0).train(), frozen):
        want = make()(input_ids=ids()).logits
        torch.testing.assert_close(on_two(make), want, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="output_router_logits=False"):
        on_two(theirs, output_router_logits=True)


def test_padding_behind_is_left_out():
    """Real tokens' logits and the loss are those of the padded batch on one rank."""
    model, tokens = ours().eval(), ids()
    real = torch.ones_like(tokens)
    real[1, 20:] = 0
    labels = tokens.masked_fill(real == 0, -100)
    want = model(input_ids=tokens, attention_mask=real, labels=labels)
    models = [ours().eval() for _ in range(2)]

    def work(links):
        with use(models[links.rank], ContextParallel(links, "ring", "zigzag")) as used:
            got = models[links.rank](input_ids=tokens, attention_mask=real, labels=labels)
            return used.sequence.gather(got.logits.detach()), got.loss.detach()

    found = run_local(2, work)
    assert torch.allclose(found[0][0][0], want.logits[0], atol=1e-5)
    assert torch.allclose(found[0][0][1, :20], want.logits[1, :20], atol=1e-5)
    torch.testing.assert_close(sum(f[1] for f in found) / 2, want.loss.detach())


def trained(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
    return loss.detach()


def on_four(place: Place) -> dict:
    """Context parallelism by two ranks, each holding half of the batch; FSDP2 and DDP over all."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    mine = ids(4).chunk(2)[mesh.get_local_rank("dp")]
    found = {}
    for kind in ("fsdp2", "ddp"):
        model = ours()
        cp = ContextParallel(mesh["cp"], "ring", "zigzag")
        if kind == "fsdp2":
            whole = mesh._flatten("all")
            for block in model.model.layers:
                fully_shard(block, mesh=whole)
            fully_shard(model, mesh=whole)
            with use(model, cp):
                loss = trained(model, mine)
            found[kind] = {n: p.full_tensor().detach() for n, p in model.named_parameters()}
        else:
            wrapped = DistributedDataParallel(model)
            with use(model, cp):
                loss = trained(wrapped, mine)
            found[kind] = {n: p.detach() for n, p in model.named_parameters()}
        torch.distributed.all_reduce(loss)
        found[f"{kind} loss"] = loss / 4
    # The ranks of a mesh with two axes: ring by Ulysses, by the mesh's own groups.
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ring", "ulysses"))
    cp = ContextParallel(both, "usp(ulysses=2)", "zigzag")
    model = ours()
    with use(model, cp):
        found["usp loss"] = model(input_ids=ids(4), labels=ids(4)).loss.detach()
    torch.distributed.all_reduce(found["usp loss"])
    return found


def test_training_steps_with_fsdp2_and_ddp_equal_one_ranks():
    one = ours()
    start = one(input_ids=ids(4), labels=ids(4)).loss.detach()
    loss = trained(one, ids(4))
    found = run(on_four, ["a", "b", "c", "d"], timeout=300)
    for place in found.values():
        for kind in ("fsdp2", "ddp"):
            torch.testing.assert_close(place[f"{kind} loss"], loss, rtol=1e-5, atol=1e-6)
            for name, right in one.named_parameters():
                torch.testing.assert_close(place[kind][name], right.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(place["usp loss"] / 4, start, rtol=1e-5, atol=1e-6)
