"""Which backend runs a call, and why.

A backend that was asked for is never replaced: if it can't, the error lists every reason. `auto`
takes the first of `ORDER` that can, and `explain` tells the whole story.
"""

from __future__ import annotations

from dataclasses import dataclass

from foveate.ops.backends.base import Backend, Inputs
from foveate.ops.backends.blocks import Blocks
from foveate.ops.backends.cpu import Cpu
from foveate.ops.backends.flex import Flex
from foveate.ops.backends.reference import Reference
from foveate.ops.backends.sdpa import Sdpa, passed_over
from foveate.ops.backends.triton import Triton
from foveate.ops.errors import BackendError, nearest

BACKENDS: dict[str, Backend] = {
    b.name: b for b in (Cpu(), Sdpa(), Triton(), Blocks(), Flex(), Reference())
}
ORDER = ("cpu", "sdpa", "triton", "blocks", "reference")


def available() -> list[str]:
    """Names of all backends, in the order in which `auto` tries them, then the others."""
    return [*ORDER, *(name for name in BACKENDS if name not in ORDER)]


@dataclass(frozen=True)
class Explanation:
    """What would run, and why.

    backend: the name of the backend that runs the call.
    reasons: for every backend, why it can't or needn't run; empty for the one that does.
    """

    backend: str
    reasons: dict[str, list[str]]

    def __str__(self) -> str:
        lines = [f"{self.backend} runs this call."]
        for name, reasons in self.reasons.items():
            if name != self.backend:
                lines.append(f"  {name}: {'; '.join(reasons)}")
        return "\n".join(lines)


def choose(inputs: Inputs, backend: str) -> Backend:
    """The backend for a call.

    Raises:
        BackendError: the name is unknown, or that backend can't run the call.
    """
    if backend != "auto":
        return forced(inputs, backend)
    for name in ORDER:
        chosen = BACKENDS[name]
        if not _passed_over(name, inputs) and not chosen.not_supported_reasons(inputs):
            return chosen
    reasons = "\n".join(f"  {name}: {'; '.join(_why_not(name, inputs))}" for name in ORDER)
    raise BackendError(f"No backend can run this call:\n{reasons}")


def forced(inputs: Inputs, backend: str) -> Backend:
    """The backend of that name, or an error with every reason why it can't run the call."""
    if backend not in BACKENDS:
        raise BackendError(
            f"backend={backend!r} is unknown; {nearest(backend, ['auto', *BACKENDS])}"
        )
    reasons = BACKENDS[backend].not_supported_reasons(inputs)
    if reasons:
        others = [
            n for n in available() if n != backend and not BACKENDS[n].not_supported_reasons(inputs)
        ]
        listed = "".join(f"\n  - {reason}" for reason in reasons)
        raise BackendError(
            f"backend={backend!r} can't run this call:{listed}\n"
            f"Use backend='auto' or one that can: {', '.join(others) or 'none'}."
        )
    return BACKENDS[backend]


def explanation(inputs: Inputs, backend: str) -> Explanation:
    """What `choose` does with the call, with the reasons for every other backend."""
    chosen = choose(inputs, backend)
    reasons = {}
    for name in available():
        found = _why_not(name, inputs)
        if name == chosen.name:
            found = []
        elif not found:
            asked = f"backend={backend!r} was asked for"
            found = [
                f"could run, but {asked if backend != 'auto' else f'{chosen.name} comes first'}"
            ]
        reasons[name] = found
    return Explanation(chosen.name, reasons)


def _why_not(name: str, inputs: Inputs) -> list[str]:
    return BACKENDS[name].not_supported_reasons(inputs) or _passed_over(name, inputs)


def _passed_over(name: str, inputs: Inputs) -> list[str]:
    """Why `auto` doesn't take a backend that could run the call."""
    if name == "sdpa":
        return passed_over(inputs, not BACKENDS["triton"].not_supported_reasons(inputs))
    if name == "flex":
        return ["compiles for every mask, so auto never takes it"]
    return []
