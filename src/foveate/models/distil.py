"""Distilling SEA from a model with dense attention, layer by layer and as a whole.

    L = w_task L_task + w_hidden mean over layers of MSE(hidden*, hidden) + w_logits KL(logits*)
      + sum over layers of L_est + L_dense + L_ctx

Lee et al. 2023, arXiv 2310.01777, and its released trainers. The student has the teacher's weights
and SEA in every layer; `foveate.methods.sea.losses` says what the layers' losses are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.methods.sea import SEAAttention
from foveate.methods.sea import Trace as Traced
from foveate.methods.sea.losses import Teacher, layer_losses
from foveate.nn import Attention
from foveate.ops import AttentionOutput
from foveate.ops.errors import InputError
from foveate.parts import Attention as Method
from foveate.parts.context import Context

IGNORED = -100


class Weights(NamedTuple):
    """Of the task's loss, of hidden states, and of logits; the layers' losses count as they are."""

    task: float
    hidden: float
    logits: float


CAUSAL = Weights(0.1, 5.0, 0.2)
ENCODER = Weights(0.1, 10.0, 0.1)


class Distilled(NamedTuple):
    """The loss of a batch, and its parts by name, without their weights."""

    loss: Tensor
    parts: dict[str, float]


def student_of(teacher: Any, attention: str = "sea") -> Any:
    """The same model with another attention: the teacher's weights, and fresh ones for what is new.

    Args:
        teacher: a `FoveateForCausalLM`, or another of `foveate.models`' with a config.
        attention: such as "sea(k=64, width=256)", for all layers.

    Raises:
        InputError: the attention needs other weights than the teacher has, beside its own.
    """
    config = deepcopy(teacher.config)
    config.attention = attention
    made = type(teacher)(config).to(next(teacher.parameters()).device)
    missing, unexpected = made.load_state_dict(teacher.state_dict(), strict=False)
    other = [name for name in missing if ".attention.attention." not in name]
    if other or unexpected:
        raise InputError(
            f"student_of(attention={attention!r}): the teacher's weights don't fit: "
            f"{', '.join([*other, *unexpected][:4])}."
        )
    return made


def new_parameters(student: nn.Module) -> list[nn.Parameter]:
    """What the teacher doesn't have: the parameters of the layers' attentions."""
    return [p for name, p in student.named_parameters() if ".attention.attention." in name]


def distillation(
    student: Any,
    teacher: Any,
    ids: Tensor,
    targets: Tensor | None = None,
    *,
    weights: Weights = CAUSAL,
    rows: int | None = None,
    dense: bool = True,
    random: torch.Generator | None = None,
    **inputs: Any,
) -> Distilled:
    """The loss of one batch.

    Args:
        student: whose layers have SEA, and are trained; others' layers learn by L_ctx alone.
        teacher: of the same layers, with dense attention.
        ids: (B, L).
        targets: (B, L), what each position must predict, -100 where nothing; None leaves the task
            out.
        weights: of the parts.
        rows: how many rows of each layer L_est and L_dense look at, drawn anew; None is all, which
            costs L^2.
        dense: whether to take L_dense, which costs as much again.
        random: for the rows.
        inputs: more for both models, such as attention_mask.

    Returns:
        The loss and "task", "hidden", "logits", "est", "dense", "ctx", as far as they are taken.

    Raises:
        InputError: the teacher isn't dense, or the layers differ in number.
    """
    with torch.no_grad(), heard(teacher) as said:
        goal = teacher(input_ids=ids, output_hidden_states=True, **inputs)
    with _traced(student) as traced:
        made = student(input_ids=ids, output_hidden_states=True, **inputs)
    if len(said) != len(traced):
        raise InputError(f"The teacher has {len(said)} layers, the student {len(traced)}.")
    chosen = None
    if rows is not None and rows < ids.shape[1]:
        chosen = torch.randperm(ids.shape[1], generator=random)[:rows].sort().values.to(ids.device)
    real = _real(ids, inputs.get("attention_mask"))
    parts: dict[str, Tensor] = {
        "hidden": torch.stack(
            [_mse(a, b, real) for a, b in zip(made.hidden_states, goal.hidden_states)]
        ).mean(),
        "logits": _kl(made.logits, goal.logits, real),
    }
    if targets is not None:
        parts["task"] = F.cross_entropy(
            made.logits.float().flatten(0, -2), targets.flatten(), ignore_index=IGNORED
        )
    for trace, layer in zip(traced, said):
        for name, loss in trace(layer, chosen, dense).items():
            parts[name] = parts.get(name, 0.0) + loss
    factors = weights._asdict()
    loss = torch.stack([factors.get(name, 1.0) * part for name, part in parts.items()]).sum()
    for name, part in (getattr(made, "aux", None) or {}).items():
        loss = loss + part if name.endswith("_loss") else loss
    return Distilled(loss, {name: float(part.detach()) for name, part in parts.items()})


def distil(
    student: Any,
    teacher: Any,
    batch: Callable[[int], tuple[Tensor, Tensor | None]],
    *,
    steps: int,
    lr: float = 5e-4,
    new_lr: float = 5e-3,
    warmup: float = 0.1,
    clip: float = 1.0,
    tell: Callable[[int, dict[str, float]], None] | None = None,
    **options: Any,
) -> list[dict[str, float]]:
    """Train the student in place: AdamW, new parameters at ten times the rate of the others.

    Args:
        student: as `student_of` makes it.
        teacher: stays as it is.
        batch: gives ids and targets of a step.
        steps: of the optimizer.
        lr: highest rate of what the teacher has, too; it rises linearly and falls as a cosine.
        new_lr: of what is new.
        warmup: share of the steps in which it rises.
        clip: of the gradient's norm.
        tell: takes each step's number and parts.
        options: as `distillation`.

    Returns:
        The parts of every step.
    """
    new = {id(p) for p in new_parameters(student)}
    groups = [
        {"params": [p for p in student.parameters() if id(p) not in new], "lr": lr},
        {"params": [p for p in student.parameters() if id(p) in new], "lr": new_lr},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
    rates = [group["lr"] for group in optimizer.param_groups]
    student.train()
    teacher.eval()
    history = []
    for number in range(steps):
        share = _schedule(number, steps, warmup)
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * share
        ids, targets = batch(number)
        found = distillation(student, teacher, ids, targets, **options)
        optimizer.zero_grad(set_to_none=True)
        found.loss.backward()
        trained = [p for p in student.parameters() if p.grad is not None]
        nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
        history.append(found.parts)
        if tell is not None:
            tell(number, found.parts)
    student.eval()
    return history


def _schedule(number: int, steps: int, warmup: float) -> float:
    rise = max(1, round(warmup * steps))
    if number < rise:
        return (number + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (number - rise) / max(1, steps - rise)))


# -- watching layers -------------------------------------------------------------------------------
class _Listener(Method, nn.Module):
    """An attention that remembers what passes through it."""

    def __init__(self, inner: Method, heard: list[Teacher]) -> None:
        nn.Module.__init__(self)
        self.inner, self.heard = inner, heard

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None
    ) -> AttentionOutput:
        """As the attention inside."""
        made = self.inner(q, k, v, ctx)
        scale = q.shape[-1] ** -0.5 if ctx is None or ctx.scale is None else ctx.scale
        self.heard.append(Teacher(q, k, made.out, scale))
        return made


def _layers(model: nn.Module) -> list[Attention]:
    return [module for module in model.modules() if isinstance(module, Attention)]


@contextmanager
def heard(teacher: nn.Module) -> Iterator[list[Teacher]]:
    """What the layers of a dense model compute, in order."""
    found: list[Teacher] = []
    layers = _layers(teacher)
    for layer in layers:
        if not layer.attention.exact:
            raise InputError(
                f"The teacher has {type(layer.attention).__name__} in layer {layer.layer}; "
                'expected dense attention, attention="full".'
            )
    with _listening(layers, [found] * len(layers)):
        yield found


@contextmanager
def _listening(layers: list[Attention], heard: list[list[Teacher]]) -> Iterator[None]:
    """Put listeners around the layers' attentions for a while."""
    kept = [layer.attention for layer in layers]
    try:
        for layer, inner, told in zip(layers, kept, heard):
            _put(layer, _Listener(inner, told))
        yield
    finally:
        for layer, inner in zip(layers, kept):
            _put(layer, inner)


def _put(layer: Attention, attention: Method) -> None:
    """Replace a layer's attention, whether either is a module or not."""
    del layer.attention
    layer.attention = attention


Trace = Callable[[Teacher, Tensor | None, bool], dict[str, Tensor]]


@contextmanager
def _traced(student: nn.Module) -> Iterator[list[Trace]]:
    """What a student's layers say of their losses, in order."""
    found: list[Trace] = []
    seas: list[SEAAttention] = []
    others: list[Attention] = []
    heard: list[list[Teacher]] = []
    for layer in _layers(student):
        if isinstance(layer.attention, SEAAttention):
            seas.append(layer.attention)
            layer.attention.trace = []
            found.append(_sea_losses(layer.attention.trace))
        else:
            others.append(layer)
            heard.append([])
            found.append(_context_loss(heard[-1]))
    try:
        with _listening(others, heard):
            yield found
    finally:
        for method in seas:
            method.trace = None


def _sea_losses(traces: list[Traced]) -> Trace:
    def losses(said: Teacher, rows: Tensor | None, dense: bool) -> dict[str, Tensor]:
        return layer_losses(traces[0], said, rows=rows, dense=dense)

    return losses


def _context_loss(heard: list[Teacher]) -> Trace:
    """Of a layer of another attention: its context is compared, nothing else."""

    def losses(said: Teacher, rows: Tensor | None, dense: bool) -> dict[str, Tensor]:
        return {"ctx": (heard[0].out.float() - said.out.float()).square().mean()}

    return losses


def _real(ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    if attention_mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    return attention_mask.bool()


def _mse(one: Tensor, two: Tensor, real: Tensor) -> Tensor:
    return (one.float() - two.float()).square()[real].mean()


def _kl(made: Tensor, goal: Tensor, real: Tensor) -> Tensor:
    """Of the teacher's next tokens and the student's, a mean over real tokens."""
    if made.dim() == 3:
        made, goal = made[real], goal[real]
    return F.kl_div(
        made.float().log_softmax(-1), goal.float().log_softmax(-1), reduction="batchmean",
        log_target=True,
    )  # fmt: skip
