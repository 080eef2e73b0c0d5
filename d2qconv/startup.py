"""Collects no garbage while the command line starts: to be imported before anything large, and ended after it.

What imports make stays; to look through it again and again took a tenth of the CPU time of `d2qconv --help`.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_WAS_ENABLED = gc.isenabled()
gc.disable()


def end() -> None:
    """Everything is imported: as before."""
    if _WAS_ENABLED:
        gc.enable()


@contextmanager
def paused() -> Iterator[None]:
    """No collection within: for what makes much that stays, and little else."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
