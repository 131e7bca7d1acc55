"""Everything at once, at random: 64 threads and 8 processes that project, change weights, copy, pickle, fork and are
interrupted; every result must have the bits that a serial run has.

Run as `soak.py FOLDER-OF-TESTS SECONDS`. Prints how much was done and what memory was taken. Whatever hangs is ended by
a watchdog that writes the stacks of all threads.
"""

from __future__ import annotations

import copy
import faulthandler
import gc
import json
import os
import pickle
import random
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor, nn

sys.path.insert(0, sys.argv[1])

from projectors import make_generator, make_images, make_projector

from defgan_fast import Projector

SECONDS = float(sys.argv[2])
THREADS, PROCESSES, SEED = 64, 8, 20180430
STATES, IMAGES = 4, 8
PATIENCE = 240  # seconds after the end until the watchdog


class Interrupted(Exception):
    """What the handler of the alarm raises."""


def interrupt(number: int, frame: FrameType | None) -> None:
    raise Interrupted


def state_of(generator: nn.Module, index: int) -> dict[str, Tensor]:
    return {
        name: value if index == 0 or not value.is_floating_point() else value * (1 - 0.05 * index)
        for name, value in generator.state_dict().items()
    }


GENERATOR = make_generator()
STATE = [{name: value.clone() for name, value in state_of(GENERATOR, i).items()} for i in range(STATES)]
X = make_images(GENERATOR, IMAGES)


def projectors() -> list[Projector]:
    """Returns a short and a long projector of one generator of their own."""
    generator = copy.deepcopy(GENERATOR)
    return [make_projector(generator, steps=steps, max_rows=rows) for steps, rows in ((10, None), (1500, 5))]


def results(projector: Projector, images: Tensor) -> tuple[Tensor, ...]:
    """Returns what a projection has for every image."""
    p = projector.project(images)
    return p.images, p.latents, p.errors, p.restarts, p.all_errors


def expectations() -> list[list[tuple[Tensor, ...]]]:
    """Returns the serial run's results, [state][projector], each a projection of all images."""
    found = []
    for state in STATE:
        pair = projectors()
        pair[0].generator.load_state_dict(state)
        found.append([results(p, X) for p in pair])
    return found


class Actor:
    """One user of the package, which does one random thing after the other."""

    def __init__(self, seed: int, expected: list[list[tuple[Tensor, ...]]], may_fork: bool) -> None:
        self.random = random.Random(seed)
        self.expected = expected
        self.may_fork = may_fork
        self.projectors = projectors()
        self.state = 0
        self.done: dict[str, int] = {}
        self.error = ""

    def set_state(self, index: int) -> None:
        self.state = index
        generator = self.projectors[0].generator
        if self.random.random() < 0.5:
            generator.load_state_dict(STATE[index])
        else:
            for name, value in generator.state_dict().items():
                value.data.copy_(STATE[index][name])

    def project(self) -> None:
        which = int(self.random.random() < 0.2)
        first = self.random.randrange(IMAGES)
        last = self.random.randrange(first, IMAGES) + 1
        got = results(self.projectors[which], X[first:last])
        for a, b in zip(got, self.expected[self.state][which], strict=True):
            assert torch.equal(a, b[first:last]), f"other bits: state {self.state}, images {first} to {last}"

    def deepcopy(self) -> None:
        self.projectors = copy.deepcopy(self.projectors)

    def pickle(self) -> None:
        self.projectors = pickle.loads(pickle.dumps(self.projectors))

    def change(self) -> None:
        self.set_state(self.random.randrange(STATES))

    def fork(self) -> None:
        if not self.may_fork:
            return
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
        try:
            child = os.fork()
            if child == 0:
                self.project_and_exit()
            status = os.waitpid(child, 0)[1]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        assert status == 0, f"a fork ended with status {status}"

    def project_and_exit(self) -> None:
        code = 1
        try:
            self.project()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def act(self) -> None:
        names = ["project"] * 12 + ["change"] * 3 + ["deepcopy", "pickle"] + ["fork"]
        name = self.random.choice(names)
        getattr(self, name)()
        self.done[name] = self.done.get(name, 0) + 1

    def run(self, end: float) -> None:
        try:
            while time.monotonic() < end:
                self.act()
        except BaseException:
            self.error = traceback.format_exc()

    def run_interrupted(self, end: float) -> None:
        """The same in a main thread, with alarms at random moments; after each, everything is set anew."""
        signal.signal(signal.SIGALRM, interrupt)
        whole = True
        while time.monotonic() < end and not self.error:
            try:
                if not whole:  # an interrupted change has left some weights of each state
                    self.set_state(self.random.randrange(STATES))
                    whole = True
                self.run_until_an_alarm(end)
            except Interrupted:
                whole = False
                self.done["interrupt"] = self.done.get("interrupt", 0) + 1

    def run_until_an_alarm(self, end: float) -> None:
        signal.setitimer(signal.ITIMER_REAL, self.random.uniform(0.01, 0.6))
        try:
            while time.monotonic() < end:
                self.act()
        except Interrupted:
            raise
        except BaseException:
            self.error = traceback.format_exc()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


def resident_megabytes() -> float:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def process(index: int, expected: list[list[tuple[Tensor, ...]]], end: float) -> int:
    # torch's own operations wait for ever for the parent's threads, which a fork does not copy; a DataLoader's workers
    # are told the same.
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(SECONDS + PATIENCE, exit=True)
    actor = Actor(SEED + 1000 + index, expected, may_fork=True)
    actor.run_interrupted(end)
    print(actor.error, file=sys.stderr, end="", flush=True)
    return 1 if actor.error or not actor.done.get("interrupt") else 0


def main() -> None:
    expected = expectations()
    torch.set_num_threads(2)
    end = time.monotonic() + SECONDS
    children = []
    for index in range(PROCESSES):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = process(index, expected, end)
            finally:
                os._exit(code)
        children.append(child)

    # Not earlier: a child would wait for ever for the watchdog's thread, which it does not have.
    faulthandler.dump_traceback_later(SECONDS + PATIENCE, exit=True)
    projectors()[0](X)
    # A child of a process with threads may not allocate as it likes (fork(2)), so only some threads fork.
    actors = [Actor(SEED + i, expected, may_fork=i % 16 == 0) for i in range(THREADS)]
    threads = [threading.Thread(target=actor.run, args=(end,)) for actor in actors]
    for thread in threads:
        thread.start()
    own = Actor(SEED + THREADS, expected, may_fork=False)
    own.run_interrupted(time.monotonic() + (end - time.monotonic()) / 3)
    early = resident_megabytes()  # all threads have their arenas by now
    own.run_interrupted(end)
    for thread in threads:
        thread.join()
    statuses = [os.waitpid(child, 0)[1] for child in children]
    late = resident_megabytes()
    done: dict[str, int] = {}
    for actor in [*actors, own]:
        for name, count in actor.done.items():
            done[name] = done.get(name, 0) + count
    errors = [actor.error for actor in [*actors, own] if actor.error]
    print(
        json.dumps({"done": done, "statuses": statuses, "errors": errors[:3], "early": early, "late": late})
    )


if __name__ == "__main__":
    main()
