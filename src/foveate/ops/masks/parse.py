"""Read a mask from its expression, such as `causal() & (window(1023, 0) | sinks(4))`."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence

from torch import Tensor

from foveate.ops.errors import InputError, nearest
from foveate.ops.masks.base import Mask
from foveate.ops.masks.fixed import documents, padding, prefix, sinks
from foveate.ops.masks.grid import neighborhood
from foveate.ops.masks.relative import causal, strided, window
from foveate.ops.masks.table import blocks, region
from foveate.ops.syntax import parse_expression

MAKERS: dict[str, Callable[..., Mask]] = {
    maker.__name__: maker
    for maker in (
        causal, window, sinks, prefix, documents, padding, blocks, strided, region,
        neighborhood,
    )
}  # fmt: skip


def parse_mask(text: str, tensors: Sequence[Tensor] = ()) -> Mask:
    """The mask that an expression names.

    Args:
        text: masks by name, combined with `&`, `|`, `~`; tensors are named t0, t1, ...
        tensors: what those names stand for.

    Raises:
        InputError: the text isn't such an expression; it says which part is not.
    """
    try:
        tree = parse_expression(_named(text, len(tensors)))
    except SyntaxError as error:
        raise InputError(f"{text!r} is not a mask expression: {error.msg}.") from error
    mask = _value(tree, tensors)
    if not isinstance(mask, Mask):
        raise InputError(f"{text!r} is not a mask; write for example 'causal() & window(1023, 0)'.")
    return mask


def _named(text: str, count: int) -> str:
    for i in range(count):
        text = text.replace(f"${i}$", f"t{i}")
    return text


def _value(node: ast.expr, tensors: Sequence[Tensor]) -> object:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd | ast.BitOr):
        return _chain(node, tensors)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
        inner = _value(node.operand, tensors)
        if isinstance(inner, Mask):
            return ~inner
        raise InputError(f"{ast.unparse(node)!r}: `~` needs a mask.")
    if isinstance(node, ast.Call):
        return _call(node, tensors)
    if isinstance(node, ast.Name) and node.id.startswith("t") and node.id[1:].isdigit():
        index = int(node.id[1:])
        if index >= len(tensors):
            raise InputError(f"{node.id} names a tensor that was not given.")
        return tensors[index]
    try:
        return ast.literal_eval(node)
    except ValueError as error:
        raise InputError(
            f"{ast.unparse(node)!r} is neither a mask, a number nor a tensor name."
        ) from error


def _chain(node: ast.BinOp, tensors: Sequence[Tensor]) -> Mask:
    """`a & b & c ...`, as long as it may be: the left side is followed in a loop."""
    rest, first = [node], node.left
    while isinstance(first, ast.BinOp) and isinstance(first.op, ast.BitAnd | ast.BitOr):
        rest.append(first)
        first = first.left
    mask = _value(first, tensors)
    for step in reversed(rest):
        other = _value(step.right, tensors)
        if not isinstance(mask, Mask) or not isinstance(other, Mask):
            raise InputError(f"{ast.unparse(step)!r}: both sides must be masks.")
        mask = mask & other if isinstance(step.op, ast.BitAnd) else mask | other
    assert isinstance(mask, Mask)
    return mask


def _call(node: ast.Call, tensors: Sequence[Tensor]) -> Mask:
    if not isinstance(node.func, ast.Name) or node.func.id not in MAKERS:
        name = ast.unparse(node.func)
        raise InputError(f"{name!r} is not a mask; {nearest(name, MAKERS)}")
    keywords = {k.arg: _value(k.value, tensors) for k in node.keywords if k.arg}
    try:
        return MAKERS[node.func.id](*(_value(a, tensors) for a in node.args), **keywords)
    except TypeError as error:
        raise InputError(f"{ast.unparse(node)!r}: {error}.") from error
