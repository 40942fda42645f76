"""EchoAtt's student: a trained model whose followers lose W_Q and W_K, and its two stages.

    stage 1   L = alpha L_I + beta L_S + gamma L_H, the teacher frozen, the same tokens to both
      L_I     (1/m) sum_i ||S_e(i) - T_e(i)||^2 over elements, e(i) the end of shared block i
      L_S     KL(softmax(S logits) || softmax(T logits)), the student first; or "forward"
      L_H     cross entropy of the student against the teacher's most likely token
    stage 2   cross entropy against the true next token

Rajabzadeh et al. 2024, arXiv 2409.14595, section 2; alpha, beta, gamma = 1/4, 1/4, 1/2, AdamW at
1e-4 with a cosine and a warm-up of 0.5%, four fifths of the tokens in stage 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.methods import make, spec
from foveate.methods.echoatt import EchoAtt, ValuesProjection, leader_map
from foveate.methods.gqa import GroupedProjection
from foveate.models.causal_lm import FoveateForCausalLM
from foveate.nn import Attention
from foveate.ops.errors import InputError
from foveate.parts.fit_loop import loop
from foveate.parts.fitting import State

IGNORED = -100
KL = ("reverse", "forward")


class EchoWeights(NamedTuple):
    """Of L_I, L_S and L_H."""

    hidden: float = 0.25
    soft: float = 0.25
    hard: float = 0.5


def echo_student(
    teacher: FoveateForCausalLM,
    followers: Sequence[int | tuple[int, int]],
    mode: str = "auto",
) -> FoveateForCausalLM:
    """The teacher's weights without W_Q and W_K of the followers; the teacher stays as it is.

    Args:
        teacher: whose layers have multi-head or grouped-query projections and one attention for
            all layers, which leaders keep.
        followers: as `EchoAtt.followers`; none gives the same model.
        mode: as `EchoAtt.mode`.

    Raises:
        InputError: layers that don't exist or can't follow, or another kind of projection.
    """
    config = deepcopy(teacher.config)
    leaders = leader_map(followers)
    layers = config.num_hidden_layers
    beyond = [n for n in leaders if n >= layers]
    if beyond:
        raise InputError(f"echo_student: layer {beyond[0]} of a model of {layers} layers.")
    attentions = {config.of_layer("attention", i) for i in range(layers)}
    if len(attentions) > 1 or config.mixer is not None:
        raise InputError(
            "echo_student: expected one attention for all layers and no mixers; got "
            f"{', '.join(sorted(attentions))}."
        )
    inner = make(attentions.pop())
    if isinstance(inner, EchoAtt):
        raise InputError("echo_student: this model's layers share maps already.")
    method = EchoAtt(followers=tuple(followers), mode=mode, inner=spec(inner))
    config.attention = spec(method)
    texts = [config.of_layer("projection", i) for i in range(layers)]
    for layer in leaders:
        projection = teacher.model.blocks[layer].attention.projection
        if type(projection) is not GroupedProjection:
            raise InputError(
                f"echo_student: layer {layer} has {type(projection).__name__}; a follower keeps "
                'plain values, of "mha", "gqa" or "mqa".'
            )
        texts[layer] = f"echoatt-values(kv_heads={projection.kv_heads})"
        if config.head_dim is None:
            config.head_dim = projection.head_dim
    config.projection = texts
    like = next(teacher.parameters())
    made = FoveateForCausalLM(config).to(like.device, like.dtype)
    missing, unexpected = made.load_state_dict(teacher.state_dict(), strict=False)
    lost = [n for n in unexpected if int(n.split(".")[2]) not in leaders]
    if missing or lost:
        raise InputError(f"echo_student: weights don't fit: {', '.join([*missing, *lost][:4])}.")
    return made.train(teacher.training)


def followers_of(model: FoveateForCausalLM) -> dict[int, int]:
    """{follower: leader} of a model; empty where no layer shares."""
    for block in model.model.blocks:
        if isinstance(block.attention, Attention) and isinstance(
            block.attention.attention, EchoAtt
        ):
            return dict(block.attention.attention.leaders)
    return {}


def block_ends(leaders: dict[int, int]) -> list[int]:
    """The last layer of each shared block, in order."""
    ends: dict[int, int] = {}
    for follower, leader in leaders.items():
        ends[leader] = max(follower, ends.get(leader, 0))
    return sorted(ends.values())


def distillation(
    student: FoveateForCausalLM,
    teacher: FoveateForCausalLM,
    ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    weights: EchoWeights = EchoWeights(),  # noqa: B008 - it is immutable
    kl: str = "reverse",
    ends: Sequence[int] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Stage 1's loss of a batch.

    Args:
        student: with followers.
        teacher: of as many layers.
        ids: (B, L) tokens.
        attention_mask: (B, L), 0 on padding, which counts nowhere.
        weights: alpha, beta, gamma.
        kl: "reverse", the student's distribution first, as printed; or "forward".
        ends: layers whose outputs L_I compares; None are the ends of the student's shared blocks.

    Returns:
        L, and "hidden", "soft" and "hard" without their weights, all differentiable.

    Raises:
        InputError: another kl, or as many layers were expected.
    """
    if kl not in KL:
        raise InputError(f"distillation(kl={kl!r}): expected one of {', '.join(KL)}.")
    ends = block_ends(followers_of(student)) if ends is None else list(ends)
    if student.config.num_hidden_layers != teacher.config.num_hidden_layers:
        raise InputError("distillation: student and teacher have different numbers of layers.")
    inputs = {"input_ids": ids, "attention_mask": attention_mask, "use_cache": False}
    with torch.no_grad():
        goal, theirs_at = _run(teacher, ends, inputs)
    made, ours_at = _run(student, ends, inputs)
    real = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask > 0
    states = [(ours_at[end].float() - theirs_at[end].float())[real] for end in ends]
    zero = made.logits.new_zeros((), dtype=torch.float32)
    ours, theirs = made.logits[real].float(), goal.logits[real].float()
    log_s, log_t = ours.log_softmax(-1), theirs.log_softmax(-1)
    first, second = (log_s, log_t) if kl == "reverse" else (log_t, log_s)
    parts = {
        "hidden": torch.stack([x.square().mean() for x in states]).mean() if states else zero,
        "soft": (first.exp() * (first - second)).sum(-1).mean(),
        "hard": F.cross_entropy(ours, theirs.argmax(-1)),
    }
    return sum((w * parts[n] for n, w in weights._asdict().items()), zero), parts


def _run(model: FoveateForCausalLM, ends: Sequence[int], inputs: dict[str, Any]) -> Any:
    """A forward, and what the blocks `ends` made; the last one's is taken before the last norm."""
    made: dict[int, Tensor] = {}

    def keep(end: int) -> Callable[..., None]:
        return lambda block, given, out: made.update({end: out.y})

    hooks = [model.model.blocks[end].register_forward_hook(keep(end)) for end in ends]
    try:
        return model(**inputs), dict(made)
    finally:
        for hook in hooks:
            hook.remove()


def next_tokens(
    student: FoveateForCausalLM, ids: Tensor, attention_mask: Tensor | None = None
) -> Tensor:
    """Stage 2's loss: cross entropy of the true next tokens of ids (B, L).

    Padding is neither predicted nor predicts: what follows it, on the left, has no past.
    """
    labels = ids
    if attention_mask is not None:
        real = attention_mask > 0
        labels = ids.masked_fill(~(real & real.roll(1, 1)), IGNORED)
    loss = student(
        input_ids=ids, attention_mask=attention_mask, labels=labels, use_cache=False
    ).loss
    assert isinstance(loss, Tensor)
    return loss


class NoState:
    """Nothing is kept: a training that is cut off begins anew."""

    def load(self) -> None:
        """Nothing."""

    def save(self, facts: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Keep nothing."""


class Stages(NamedTuple):
    """How a student is trained.

    Attributes:
        first: steps of distillation.
        second: steps on the true next tokens.
        lr: the highest rate; each stage rises to it and falls as a cosine.
        warmup: share of each stage's steps in which it rises.
        weight_decay: of AdamW.
        clip: of the gradient's norm.
        weights: alpha, beta, gamma.
        kl: as `distillation`.
    """

    first: int = 320
    second: int = 80
    lr: float = 1e-4
    warmup: float = 0.005
    weight_decay: float = 0.01
    clip: float = 1.0
    weights: EchoWeights = EchoWeights()
    kl: str = "reverse"

    def rate(self, number: int) -> float:
        """Of step `number`, counted through both stages."""
        at, steps = (number, self.first) if number < self.first else (
            number - self.first, self.second
        )  # fmt: skip
        rise = max(1, round(self.warmup * steps))
        if at < rise:
            return self.lr * (at + 1) / rise
        return self.lr * 0.5 * (1 + math.cos(math.pi * (at - rise) / max(1, steps - rise)))


def adjust(
    student: FoveateForCausalLM,
    teacher: FoveateForCausalLM,
    batch: Callable[[int], Tensor],
    stages: Stages = Stages(),  # noqa: B008 - it is immutable
    *,
    progress: Callable[[float, str], None] = lambda share, doing: None,
    state: State | None = None,
    every: int = 20,
    setting: dict[str, Any] | None = None,
) -> list[dict[str, float]]:
    """Train the student in place, stage by stage.

    Args:
        student: as `echo_student` makes it.
        teacher: stays as it is.
        batch: token ids (B, L) of a step, without padding.
        stages: how.
        progress: hears of each step.
        state: where to keep what is needed to go on; None keeps nothing.
        every: steps between two savings.
        setting: more that decides the training, such as the text.

    Returns:
        The loss of every step, and its parts.

    Raises:
        FitError: a loss is no finite number.
    """
    teacher.eval()
    student.train()
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=stages.lr, weight_decay=stages.weight_decay
    )
    device = next(student.parameters()).device

    def step(number: int) -> dict[str, float]:
        for group in optimizer.param_groups:
            group["lr"] = stages.rate(number)
        ids = batch(number).to(device)
        parts: dict[str, Tensor] = {}
        if number < stages.first:
            loss, parts = distillation(student, teacher, ids, weights=stages.weights, kl=stages.kl)
        else:
            loss = next_tokens(student, ids)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), stages.clip)
        optimizer.step()
        told = {"loss": float(loss.detach())}
        return told | {name: float(part.detach()) for name, part in parts.items()}

    decided = {"stages": [*stages[:6], list(stages.weights), stages.kl]} | (setting or {})
    try:
        return loop(
            student, optimizer, step, stages.first + stages.second, progress,
            NoState() if state is None else state, every=every, setting=decided,
        )  # fmt: skip
    finally:
        student.eval()


def saved_parameters(teacher: FoveateForCausalLM, student: FoveateForCausalLM) -> int:
    """Weights that the followers lost."""
    count = sum(p.numel() for p in teacher.parameters())
    return count - sum(p.numel() for p in student.parameters())


def value_layers(model: FoveateForCausalLM) -> list[int]:
    """Layers that have values only."""
    return [
        i
        for i, block in enumerate(model.model.blocks)
        if isinstance(block.attention, Attention)
        and isinstance(block.attention.projection, ValuesProjection)
    ]
