"""Calls that a signal interrupts, each far longer than the test that runs this file would wait.

Run as `interrupted.py FOLDER-OF-TESTS THREADS CASE...`; prints a line for each case that behaved. A case that does not
hear its signal goes on for minutes, until the test ends this process.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import pytest
import torch
from torch import Tensor

sys.path.insert(0, sys.argv[1])

from projectors import make_generator, make_images, make_projector, same

import defgan_fast as dg
from defgan_fast import _C
from defgan_fast.kernels import ops

SECONDS = 0.3  # until the signal; a call's first question comes sooner


class Alarm(Exception):
    """What the handler raises."""


def raise_alarm(number: int, frame: FrameType | None) -> None:
    raise Alarm("from the handler")


@contextmanager
def alarm(handler: Callable[[int, FrameType | None], None], every: float = 0.0) -> Iterator[None]:
    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, SECONDS, every)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def must_hear(call: Callable[[], object], alone: bool = True) -> None:
    """The call ends with what the handler raised, not with another error that wraps it, and leaves no thread busy."""
    with pytest.raises(Alarm) as caught, alarm(raise_alarm):
        call()
    error = caught.value
    names = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    assert error.args == ("from the handler",), error.args
    assert names[-1] == "raise_alarm", names
    assert names[0] == "must_hear", names
    assert error.__cause__ is None, error.__cause__
    assert not alone or _C.thread_counts()["busy"] == 0


GENERATOR = make_generator()
IMAGES = make_images(GENERATOR, 64)
LONG = make_projector(GENERATOR, steps=100_000, restarts=10)
SHORT = make_projector(GENERATOR, steps=20)


def mnist_row() -> tuple[dg.Projector, Tensor]:
    return dg.Projector(dg.load_generator("mnist"), steps=20_000, restarts=1), torch.full((1, 1, 28, 28), 0.5)


def must_hear_during(call: Callable[[], object]) -> None:
    """Of calls that take seconds and not minutes: several signals are heard before one is over."""
    heard: list[int] = []
    with alarm(lambda number, frame: heard.append(number), every=0.2):
        call()
    assert len(heard) > 1, heard
    must_hear(call)


def decode() -> None:
    projector, _ = mnist_row()
    parameters = [p.detach() for p in projector.plan.tensors(projector.generator)]
    latents = torch.randn(30_000, projector.latent_size)
    must_hear_during(lambda: ops.decode(latents, parameters, projector.plan.text, 0))


def nearest() -> None:
    """The candidates are new at every call, and decoded first."""
    projector, image = mnist_row()
    parameters = [p.detach() for p in projector.plan.tensors(projector.generator)]
    size = projector.latent_size
    must_hear_during(
        lambda: ops.nearest(image, torch.randn(30_000, size), parameters, projector.plan.text, 3)
    )


def project() -> None:
    expected = SHORT.project(IMAGES)
    must_hear(lambda: LONG(IMAGES))
    again = SHORT.project(IMAGES)
    assert same(again, expected), "other bits after an interruption"


def row() -> None:
    projector, image = mnist_row()
    must_hear(lambda: projector(image))


def in_inference_mode() -> None:
    with torch.inference_mode():
        must_hear(lambda: LONG(IMAGES))


def in_bfloat16() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        must_hear(lambda: LONG(IMAGES))


def before_a_gradient() -> None:
    must_hear(lambda: LONG(IMAGES.clone().requires_grad_()))


def reference() -> None:
    slow = make_projector(GENERATOR, steps=100_000, backend="reference")
    must_hear(lambda: slow(IMAGES))


def unrolled() -> None:
    projector = make_projector(GENERATOR, steps=30_000, restarts=1, gradient="unrolled")
    x = IMAGES[:2].clone().requires_grad_()
    total = projector(x).sum()
    must_hear(total.backward)


def keyboard() -> None:
    # What a shell starts in the background ignores this signal, and Python then leaves it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(SECONDS, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt) as caught:
        LONG(IMAGES)
    assert type(caught.value) is KeyboardInterrupt


def a_handler_that_returns() -> None:
    """The call goes on, with the same bits; the handler finds torch and its processor as it would anywhere else."""
    projector, image = mnist_row()
    projector.steps = 3000
    expected = projector.project(image)
    seen = []

    def handler(number: int, frame: FrameType | None) -> None:
        x = torch.ones(2, requires_grad=True)
        (x * x).sum().backward()
        tiny = torch.tensor([1.17549435e-38]) * 0.5
        nested = torch.equal(SHORT(IMAGES[:2]), inner)
        seen.append((x.grad is not None and x.grad.tolist() == [2, 2], tiny.item() > 0, nested))

    inner = SHORT(IMAGES[:2])
    with alarm(handler, every=0.2):
        got = projector.project(image)
    assert seen, "the call was over before the signal came: it tests nothing"
    assert all(all(one) for one in seen), seen
    assert same(got, expected)


def in_another_thread() -> None:
    """A signal ends what the main thread does, never what another thread computes."""
    steady = make_projector(GENERATOR, steps=3000)
    expected, got = steady(IMAGES), []
    thread = threading.Thread(target=lambda: got.append(steady(IMAGES)))
    thread.start()
    must_hear(lambda: LONG(IMAGES), alone=False)
    thread.join()
    assert _C.thread_counts()["busy"] == 0
    assert torch.equal(got[0], expected)


def compiled_and_exported() -> None:
    """Of graphs that exist: what a handler raises while torch makes one is torch's to report."""
    projector = make_projector(GENERATOR, steps=5000, restarts=10)
    example = IMAGES[:2].clone()
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    exported = torch.export.export(projector, (example,), dynamic_shapes=dynamic).module()
    must_hear(lambda: exported(IMAGES))
    compiled = torch.compile(projector, fullgraph=True, backend="aot_eager")
    torch._dynamo.mark_dynamic(example, 0)
    compiled(example)
    must_hear(lambda: compiled(IMAGES))


class Worker(torch.utils.data.Dataset):
    """Is interrupted inside of a DataLoader's worker, where it is the main thread too."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        must_hear(lambda: LONG(IMAGES))
        return index


def in_workers() -> None:
    SHORT(IMAGES)  # the parent has torch's pool, which the workers must do without
    loader = torch.utils.data.DataLoader(Worker(), num_workers=2, multiprocessing_context="fork")
    assert sorted(int(i) for batch in loader for i in batch) == [0, 1]


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    for case in sys.argv[3:]:
        globals()[case]()
        print(case, flush=True)
