"""How far an attack is: the numbers behind a progress bar, which reach their end however much work is dropped."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with (work done, all work), in images times model calls; at the end both are equal."""


class Meter:
    """Counts the work of an attack and reports it; dropped work counts as done, so that the end is reached."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def at(self, done: int) -> None:
        """Reports that ``done`` of the work is behind us; what was reported before is never taken back."""
        self.done = min(max(self.done, done), self.total)
        if self.progress is not None:
            self.progress(self.done, self.total)

    def advance(self, work: int) -> None:
        """Reports that so much more of the work is behind us."""
        self.at(self.done + work)

    def finish(self) -> None:
        """Reports that nothing is left to do."""
        if self.done < self.total:
            self.at(self.total)
