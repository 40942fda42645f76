"""Accelerators: price, peak, bandwidth, memory, network; a table in TOML that users extend.

The table that ships is `foveate/data/hardware.toml`, whose head says what each field means; a
user's file has the same form.
"""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from foveate.ops.errors import InputError, nearest

SHIPPED = Path(__file__).parent.parent / "data" / "hardware.toml"


@dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
        name: of the chip.
        price: USD for an hour.
        bf16: dense peak, FLOP/s.
        bandwidth: of its memory, bytes/s.
        memory: bytes.
        network: of a server, bytes/s, all its cards together.
        fp8: dense peak, FLOP/s; None where the chip has no FP8.
        chips: in a server.

    Raises:
        InputError: a number that isn't finite and above 0.
    """

    name: str
    price: float
    bf16: float
    bandwidth: float
    memory: float
    network: float
    fp8: float | None = None
    chips: int = 8

    def __post_init__(self) -> None:
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if value is None and field.name == "fp8":
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value <= 0:
                raise InputError(
                    f"hardware {self.name}: {field.name} = {value!r}; expected a number above 0."
                )

    @property
    def peak(self) -> float:
        """FLOP/s at the lowest precision that it multiplies in: FP8 where it has it (E2)."""
        return self.bf16 if self.fp8 is None else self.fp8

    @property
    def per_flop(self) -> float:
        """U_flop: USD for one operation at the peak."""
        return self.price / 3600 / self.peak

    @property
    def per_byte(self) -> float:
        """U_byte: USD for one byte read from memory."""
        return self.price / 3600 / self.bandwidth

    @property
    def balance(self) -> float:
        """X / M: operations for each byte above which a kernel is bound by compute."""
        return self.peak / self.bandwidth


def table(path: str | Path | None = None) -> dict[str, Chip]:
    """The chips that ship, and a user's above them.

    Args:
        path: of a TOML file in the form of `SHIPPED`; None is none.

    Raises:
        InputError: there is no such file, it is no TOML, or a chip's fields are missing or wrong.
    """
    found = _read(SHIPPED)
    return found if path is None else found | _read(Path(path).expanduser())


def choose(chips: dict[str, Chip], names: str, *, bf16: bool = False) -> list[Chip]:
    """Chips by their names, comma-separated; "all" is every one.

    Args:
        chips: as `table` gives them.
        names: of those that are wanted.
        bf16: their FP8 is left alone.

    Raises:
        InputError: an unknown name.
    """
    if bf16:
        chips = {name: replace(chip, fp8=None) for name, chip in chips.items()}
    if names == "all":
        return list(chips.values())
    chosen = []
    for name in dict.fromkeys(n.strip() for n in names.split(",")):
        if name not in chips:
            raise InputError(
                f"hardware {name!r} is not known; {nearest(name, chips)} Others come from a file: "
                "--hardware FILE."
            )
        chosen.append(chips[name])
    return chosen


def _read(path: Path) -> dict[str, Chip]:
    try:
        given: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror}).") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no TOML ({error}).") from error
    known = [field.name for field in fields(Chip)][1:]
    found = {}
    for name, values in given.items():
        if not isinstance(values, dict):
            raise InputError(
                f"{path}: {name} = {values!r} stands outside a chip; expected sections such as "
                f"[H800] with {', '.join(known)}."
            )
        for key in values:
            if key not in known:
                raise InputError(f"{path}, [{name}]: {key} is not known; {nearest(key, known)}")
        missing = [key for key in known if key not in values and key not in ("fp8", "chips")]
        if missing:
            raise InputError(f"{path}, [{name}]: {', '.join(missing)} missing.")
        found[name] = Chip(name, **values)
    return found
