"""Python expressions, read by one thread at a time."""

from __future__ import annotations

import ast
from threading import Lock

_ONE = Lock()


def parse_expression(text: str) -> ast.expr:
    """The tree of an expression.

    Python 3.11's parser keeps a counter that threads share, and fails with "AST constructor
    recursion depth mismatch" when two of them parse at once (python/cpython#106905).

    Raises:
        SyntaxError: it isn't one.
    """
    with _ONE:
        return ast.parse(text, mode="eval").body
