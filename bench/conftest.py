"""What the benchmark suites share. Run them on a quiet machine: `pytest bench --benchmark-only`."""

from __future__ import annotations

import pytest

from defgan_fast.benchmark import generators, peers, run


@pytest.fixture(scope="session")
def generator():
    """Returns the MNIST geometry with random weights that move."""
    return generators.moving_generator("mnist")


@pytest.fixture
def checked(generator):
    """Returns a function that prepares a peer for a problem and asserts that it is correct, before it is timed."""

    def prepare(peer: peers.Peer, images: int, restarts: int) -> tuple[peers.Run, peers.Work]:
        work = run.problem(generator, images, restarts)
        prepared = peer.prepare(work)
        run.check(peer, prepared, run.expected_errors(work))
        return prepared, work

    return prepare
