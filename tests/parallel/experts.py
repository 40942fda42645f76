"""What ranks with experts of their own compute, and the same in one process."""

from __future__ import annotations

import torch
from torch import distributed
from torch.nn import functional

from foveate.models import (
    FoveateConfig,
    FoveateEncoderConfig,
    FoveateForCausalLM,
    FoveateForSequenceClassification,
)
from foveate.ops.errors import InputError
from foveate.parallel.experts import ExpertPart, expert_part, share_gradients, whole_state

RANKS = 3
ROUTERS = ("top-k", "similarity-smoe", "attention-smoe", "xmoe", "stable-moe")
PADDED = {
    "top-k": ("expert_balance_loss", "weight"),
    "stable-moe": ("expert_choice_loss", "scores.words.weight"),
}
SIZES = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "moe_layers": [0, 1], "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 8, "router_renormalize": True, "router_balance": 0.1,
}  # fmt: skip


def model_of(router, per_slot=True):
    torch.manual_seed(0)
    config = FoveateConfig(**SIZES, router=router, router_balance_per_slot=per_slot)
    return FoveateForCausalLM(config).double()


def tokens():
    random = torch.Generator().manual_seed(1)
    return torch.randint(1, 40, (RANKS * 2, 11), generator=random)


def padded():
    """Padding behind, of other lengths on each rank, and labels that leave it out."""
    ids = tokens()
    real = torch.arange(11) < torch.tensor([11, 9, 6, 8, 10, 11])[:, None]
    return ids.masked_fill(~real, 0), real.long()


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), lr=0.5)


def trained(model, ids, group=None):
    """Two steps: both losses, and the last step's gradients."""
    optimizer, losses = optimizer_of(model), []
    for _ in range(2):
        optimizer.zero_grad()
        out = model(ids)
        # In float64; the model's own loss is taken in float32.
        loss = functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss = loss + sum(x for name, x in out.aux.items() if name.endswith("_loss"))
        loss.backward()
        if group is not None:
            share_gradients(model, group)
        losses.append(loss.item())
        gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
        optimizer.step()
    return {"losses": losses, "gradients": gradients, "load": out.aux["layers.1.expert_load"]}


def on_ranks(place):
    found, group = {}, distributed.group.WORLD
    mine = slice(2 * place.rank, 2 * place.rank + 2)
    for router in ROUTERS:
        whole = model_of(router)
        part = expert_part(whole, group)
        part.eval()
        with torch.no_grad():
            logits = part(tokens()[mine]).logits
        held = [m for m in part.modules() if isinstance(m, ExpertPart)]
        sent = [m.sent for m in held]
        part.train()
        facts = trained(part, tokens()[mine], group)
        found[router] = facts | {
            "logits": logits,
            "sent": sent,
            "experts": [list(m.experts) for m in held],
            "numbers": sum(p.numel() for p in part.parameters()),
            "state": whole_state(part, group),
        }
    found["padded"] = {
        router: losses_of(expert_part(model_of(router, False), group), router, mine)
        for router in PADDED
    }
    found["idle"] = idle(group)
    found["frozen"] = idle(group, frozen=True)
    found["encoder"] = encoded(expert_part(encoder(), group), mine)
    found["refused"] = refused()
    return found


def losses_of(model, router, mine):
    """A router's own loss alone, of a padded batch; its gradient on who learns from it."""
    ids, mask = padded()
    aux = model.train()(ids[mine], attention_mask=mask[mine]).aux
    name, weight = PADDED[router]
    aux[name].backward()
    grad = model.get_parameter(f"model.layers.0.feedforward.router.{weight}").grad
    return aux[name].item(), grad, aux["layers.0.expert_load"]


def idle(group, frozen=False):
    """Every token to the first two experts: ranks without tokens take part in the backward.

    Frozen: only experts are trained, so that no row that travels has a gradient of its own.
    """
    model = expert_part(model_of("top-k"), group).train()
    if frozen:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith((".gate", ".up", ".down")))
    for block in model.model.layers:
        block.feedforward.router.bias.copy_(torch.tensor([9.0, 8, 0, 0, 0]))
        if frozen:
            block.feedforward.balance = 0.0
    model(tokens()[:2], labels=tokens()[:2]).loss.backward()
    share_gradients(model, group)
    grads = [block.feedforward.gate.grad for block in model.model.layers]
    return [bool(g.abs().sum() > 0) for g in grads]


def encoder():
    torch.manual_seed(0)
    config = FoveateEncoderConfig(**SIZES, router="similarity-smoe", num_labels=3)
    return FoveateForSequenceClassification(config).double().eval()


def encoded(model, mine):
    ids, mask = padded()
    with torch.no_grad():
        return model(ids[mine], attention_mask=mask[mine]).logits


def refused():
    said = []
    for more in ({"num_experts": 2}, {"moe_layers": None}):
        try:
            expert_part(FoveateForCausalLM(FoveateConfig(**(SIZES | more))))
        except InputError as error:
            said.append(str(error))
    return said
