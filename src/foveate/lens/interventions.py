"""Interventions on what heads write: single components removed, rescaled or added to.

A head's output at a token is z W_O, z its mixed values. Along a direction v_i that it writes, its
coefficient is z W_O v_i = sum_j a_j (x_j u_i) s_i: the component's sum over sources. So

    activations   y <- y + sum_i ((c_i - 1) (z W_O v_i) + b_i) v_i
    weights       W_O <- W_O (I + sum_i (c_i - 1) v_i v_i^T)

with factors c_i (0 removes, 1 leaves, 2 doubles) and steps b_i along v_i ("steering"). The first
can be limited to some tokens (a query's channel works at the last one) and to one path: a later
head's query, key or value sees the change and nothing else does. What biases add to z counts as the
head's. Merullo et al. 2024, arXiv 2406.09519.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foveate.lens.composition import KINDS, Kind
from foveate.lens.reading import Place, places
from foveate.ops.errors import InputError, nearest

END = -1


@dataclass(frozen=True, eq=False)
class Edit:
    """A change of what one head writes along some directions.

    Attributes:
        layer, head: whose output.
        directions: (D, n) orthonormal columns, such as `spectrum.v[head][:, [0, 2]]`.
        factor: on the coefficients, one for all or n of them; 0 removes.
        step: added to the coefficients, one or n; the directions' signs are as they are given (see
            `signed`).
        positions: of tokens, negative from the end: (n,) for all rows of a batch or (B, n);
            None is every token.

    Raises:
        InputError: directions aren't orthonormal, or not as many factors.
    """

    layer: int
    head: int
    directions: Tensor
    factor: float | Sequence[float] = 0.0
    step: float | Sequence[float] = 0.0
    positions: Sequence[int] | Tensor | None = None

    def __post_init__(self) -> None:
        v = self.directions
        if v.dim() != 2 or not v.is_floating_point():
            raise InputError(f"Edit(directions): expected floats (D, n), got {tuple(v.shape)}.")
        eye = torch.eye(v.shape[1], dtype=v.dtype, device=v.device)
        if not torch.allclose(v.mT @ v, eye, atol=1e-3):
            raise InputError(
                "Edit(directions): the columns aren't orthonormal; those of one head's SVD are "
                "(torch.linalg.qr makes any set so)."
            )
        for name in ("factor", "step"):
            given = getattr(self, name)
            if isinstance(given, Sequence) and len(given) != v.shape[1]:
                raise InputError(
                    f"Edit({name}): {len(given)} numbers for {v.shape[1]} directions; give one for "
                    "each, or one for all."
                )

    def changes(self, z: Tensor, place: Place) -> Tensor:
        """What is added to the layer's output, (B, L, D), from its mixed values (B, L, H d).

        In float32 at least: with 8 bits of mantissa what is taken away wouldn't be gone.
        """
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        index = place.out.index.to(z.device)[self.head]
        w = place.out.weight_of(self.head).to(z)  # (d, D)
        v = self.directions.to(z)
        factor = torch.as_tensor(self.factor, dtype=z.dtype, device=z.device)
        step = torch.as_tensor(self.step, dtype=z.dtype, device=z.device)
        coefficients = (factor - 1) * (z[..., index] @ (w @ v)) + step
        return (coefficients * self._chosen(z)) @ v.mT

    def _chosen(self, z: Tensor) -> Tensor:
        """(B or 1, L, 1) of ones where the change applies."""
        if self.positions is None:
            return z.new_ones(1, 1, 1)
        batch, length = z.shape[:2]
        at = torch.as_tensor(self.positions, device=z.device)
        at = at[None].expand(batch, -1) if at.dim() == 1 else at
        if at.dim() != 2 or len(at) != batch or at.numel() == 0:
            raise InputError(
                f"Edit(positions): expected (n,) or ({batch}, n), got {tuple(at.shape)}."
            )
        if int(at.min()) < -length or int(at.max()) >= length:
            raise InputError(
                f"Edit(positions): {int(at.min())} to {int(at.max())} in a sequence of {length}."
            )
        return z.new_zeros(batch, length).scatter(1, at % length, 1.0)[..., None]


@dataclass(frozen=True, eq=False)
class Path:
    """An edit that only one later head sees, in one of its maps; all else runs as before.

    Attributes:
        edit: the change of the early head.
        layer, head: of the later head. Grouped heads share keys and values: there the whole group
            sees it.
        kind: "q", "k" or "v".

    Raises:
        InputError: the later head isn't later, or the kind is unknown.
    """

    edit: Edit
    layer: int
    head: int
    kind: Kind = "q"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"Path(kind={self.kind!r}): {nearest(str(self.kind), KINDS)}")
        if self.layer <= self.edit.layer:
            raise InputError(
                f"Path: layer {self.layer} doesn't stand behind layer {self.edit.layer}, so it "
                "sees nothing of what that writes."
            )


def signed(directions: Tensor, coefficients: Tensor) -> Tensor:
    """Directions (D, n) turned so that their mean coefficient on data (..., n) is positive."""
    mean = coefficients.flatten(0, -2).mean(0)
    return directions * torch.where(mean < 0, -1.0, 1.0).to(directions)


@contextmanager
def edited(model: nn.Module, *edits: Edit | Path) -> Iterator[None]:
    """Run a model with changes, as long as the context lasts; its weights stay as they are.

        with edited(model, Edit(7, 3, spectrum.v[at][:, :1], positions=[END])):
            logits = model(ids).logits

    Several changes add up, each computed from what the model wrote itself.

    Raises:
        InputError: a head that isn't there, or directions of another width.
    """
    known = {place.layer: place for place in places(model)}
    for one in edits:
        _check(one, known)
    ends: dict[tuple[int, str, int], list[Path]] = {}
    for one in edits:
        if isinstance(one, Path):
            ends.setdefault((one.layer, one.kind, _slot_of(one, known)), []).append(one)
    with ExitStack() as stack:
        plain = [_plain(one, known) for one in edits if isinstance(one, Edit)]
        for hook in (*plain, *(h for paths in ends.values() for h in _along(paths, known))):
            stack.callback(hook.remove)
        yield


def _check(one: Edit | Path, known: dict[int, Place]) -> None:
    edit = one if isinstance(one, Edit) else one.edit
    for layer, head in ((edit.layer, edit.head), (one.layer, one.head)):
        if layer not in known or not 0 <= head < known[layer].heads:
            raise InputError(
                f"There is no head {layer}.{head}: the model has layers {min(known)} to "
                f"{max(known)} with {known[min(known)].heads} heads."
            )
    dim = known[edit.layer].out.weight_of(0).shape[-1]
    if edit.directions.shape[0] != dim:
        raise InputError(
            f"Edit(directions): {edit.directions.shape[0]} wide, but the model writes {dim}."
        )


def _slot_of(path: Path, known: dict[int, Place]) -> int:
    """Which of its map's heads the later head reads with."""
    late = known[path.layer]
    return path.head * len(late.slot(path.kind).index) // late.heads


def _plain(edit: Edit, known: dict[int, Place]) -> Any:
    place = known[edit.layer]

    def hook(module: nn.Module, given: Any, output: Tensor) -> Tensor:
        return (output + edit.changes(given[0], place)).to(output)

    return place.out.module.register_forward_hook(hook)


def _along(paths: list[Path], known: dict[int, Place]) -> list[Any]:
    """Hooks for all paths that end in the same map of the same head."""
    late = known[paths[0].layer]
    slot = late.slot(paths[0].kind)
    mine = slot.index[_slot_of(paths[0], known)]
    changes: dict[int, Tensor] = {}
    residual: dict[str, Tensor] = {}

    def write(number: int) -> Any:
        edit = paths[number].edit

        def hook(module: nn.Module, given: Any, output: Tensor) -> None:
            changes[number] = edit.changes(given[0], known[edit.layer])

        return hook

    def before(module: nn.Module, given: Any) -> None:
        residual["x"] = given[0]

    def read(module: nn.Module, given: Any, output: Tensor) -> Tensor:
        x = residual["x"] if late.norm is not None else given[0]
        changed = (x + torch.stack(list(changes.values())).sum(0)).to(x)
        if late.norm is not None:
            changed = late.norm.forward(changed)
        seen = output.clone()
        index = mine.to(output.device)
        seen[..., index] = module.forward(changed)[..., index]
        return seen

    hooks = [
        known[path.edit.layer].out.module.register_forward_hook(write(number))
        for number, path in enumerate(paths)
    ]
    hooks.append(slot.module.register_forward_hook(read))
    if late.norm is not None:
        hooks.append(late.norm.register_forward_pre_hook(before))
    return hooks


@torch.no_grad()
def coefficients(model: nn.Module, layer: int, head: int, directions: Tensor, run: Any) -> Tensor:
    """Coefficients z W_O v_i of a head while `run()` runs the model: (B, L, n).

    Args:
        model: the model.
        layer: of the head.
        head: its index.
        directions: (D, n).
        run: called once, without arguments.
    """
    place = {p.layer: p for p in places(model)}[layer]
    found: list[Tensor] = []

    def hook(module: nn.Module, given: Any) -> None:
        z = given[0]
        w = place.out.weight_of(head).to(z)
        found.append(z[..., place.out.index.to(z.device)[head]] @ (w @ directions.to(z)))

    handle = place.out.module.register_forward_pre_hook(hook)
    try:
        run()
    finally:
        handle.remove()
    return found[-1]


@torch.no_grad()
def rescale_weights(model: nn.Module, *edits: Edit) -> None:
    """Write edits into W_O for good: W_O <- W_O (I + sum_i (c_i - 1) v_i v_i^T).

    Raises:
        InputError: as `edited`; or an edit has steps or positions, which weights can't hold.
    """
    known = {place.layer: place for place in places(model)}
    for one in edits:
        if not isinstance(one, Edit):
            raise InputError("A path can't be written into weights: others would see it too.")
        _check(one, known)
        if one.positions is not None or bool(torch.as_tensor(one.step).any()):
            raise InputError("Weights hold factors only: leave positions and steps out.")
    for one in edits:
        place = known[one.layer]
        index = place.out.index[one.head]
        weight: Any = place.out.module.weight
        w = place.out.weight_of(one.head)
        work = torch.promote_types(w.dtype, torch.float32)
        v = one.directions.to(w.device, work)
        factor = torch.as_tensor(one.factor, dtype=work, device=w.device)
        w = (w.to(work) + ((factor - 1) * (w.to(work) @ v)) @ v.mT).to(weight.dtype)
        if type(place.out.module).__name__ == "Conv1D":
            weight[index] = w
        else:
            weight[:, index] = w.mT


@contextmanager
def rescaled(model: nn.Module, *edits: Edit) -> Iterator[None]:
    """As `rescale_weights`, until the context ends; the weights are then exactly as before."""
    known = {place.layer: place for place in places(model)}
    touched = [known[e.layer].out.module for e in edits if e.layer in known]
    kept: list[tuple[Any, Tensor]] = [(m.weight, m.weight.detach().clone()) for m in touched]  # type: ignore[operator]
    try:
        rescale_weights(model, *edits)
        yield
    finally:
        with torch.no_grad():
            for weight, old in kept:
                weight.copy_(old)
