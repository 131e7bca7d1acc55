"""How busy the machine was with something else while a measurement ran.

Two cores shared with a training or a build give numbers that mean nothing, and nothing in the numbers shows
it. Linux counts the time that all processes had and the time that this one had; the difference is the
others'.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

STAT = Path("/proc/stat")
DISTURBED = 0.1  # cores taken by others, above which a measurement is not to be trusted


class OtherLoad:
    """A context manager; after it, `cores` is how many cores' worth of time other processes took, or None."""

    def __init__(self) -> None:
        self.cores: float | None = None

    def __enter__(self) -> OtherLoad:
        self._start = (time.perf_counter(), _busy_seconds(), _own_seconds())
        return self

    def __exit__(self, *_: object) -> None:
        wall, busy, own = self._start
        now = _busy_seconds()
        elapsed = time.perf_counter() - wall
        if busy is not None and now is not None and elapsed > 0:
            self.cores = max(0.0, (now - busy) - (_own_seconds() - own)) / elapsed


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _busy_seconds() -> float | None:
    """Time that all processors together spent on any process since the start, None where it is not told."""
    try:
        fields = [int(field) for field in STAT.read_text().split("\n", 1)[0].split()[1:]]
    except (OSError, ValueError, IndexError):
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields[:8]
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
