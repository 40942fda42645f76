"""Masks and methods are read from text in many threads at once."""

import gc
import sys
import threading

import pytest

from foveate.methods.naming import make
from foveate.ops.masks.parse import parse_mask


class _Cycle:
    """Garbage whose finalizer lets other threads run in the middle of a parse."""

    def __init__(self):
        self.me = self

    def __del__(self):
        sum(range(50))


@pytest.mark.parametrize(
    "read",
    [
        lambda: parse_mask("causal() & (window(1023, 0) | sinks(4)) & ~(prefix(3) | sinks(1))"),
        lambda: make("sink-window(sinks=4, window=128)"),
    ],
    ids=["mask", "method"],
)
def test_eight_threads_may_read_at_once(read):
    errors = []

    def go():
        try:
            for _ in range(100):
                _Cycle()
                read()
        except BaseException as error:
            errors.append(error)

    interval, thresholds = sys.getswitchinterval(), gc.get_threshold()
    sys.setswitchinterval(1e-6)
    gc.set_threshold(5)
    try:
        threads = [threading.Thread(target=go) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
        gc.set_threshold(*thresholds)
    assert not errors
