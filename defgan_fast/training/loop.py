"""The loop around every trainer: progress bar, metrics, checkpoints, and a clean end at any moment.

A checkpoint holds everything that decides the following steps: weights, optimisers, random state and data
order. It is written under a temporary name, flushed to the disk and renamed, so that a run that was killed at
any moment resumes from a whole one and ends with the same bits as a run that was never stopped (on the same
machine with the same number of threads).
"""

from __future__ import annotations

import csv
import io
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from defgan_fast import progress
from defgan_fast.weights import write_atomically

CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.csv"
FORMAT = "defgan_fast training 1"


class Interrupted(KeyboardInterrupt):
    """Training was stopped by a signal after saving; the message says at which step and how to go on."""


class Trainer(Protocol):
    """What the loop needs of a trainer."""

    settings: dict[str, Any]
    device: torch.device
    step: int

    def advance(self) -> dict[str, torch.Tensor]:
        """Do one step and return its metrics as tensors of one element (reading them may synchronise)."""

    def state(self) -> dict[str, Any]:
        """Everything that decides the following steps, except the random state of PyTorch itself."""

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state`."""


def run(
    trainer: Trainer,
    steps: int,
    out: Path,
    *,
    resume: bool = False,
    checkpoint_every: int = 500,
    log_every: int = 20,
    sample_every: int = 0,
    on_sample: Callable[[int], None] | None = None,
    title: str = "training",
) -> None:
    """Advance ``trainer`` until it has made ``steps`` steps, and leave a checkpoint.

    Args:
        trainer: the trainer, fresh; its settings must equal those of the checkpoint it resumes from.
        steps: total number of steps, those before the resumption counted.
        out: folder for ``checkpoint.pt`` and ``metrics.csv``; made if need be.
        resume: continue from the checkpoint in ``out`` if there is one. Without it a checkpoint in ``out``
            is an error, so that no finished run is overwritten by accident.
        checkpoint_every: steps between checkpoints.
        log_every: steps between rows of the metrics and updates of the bar.
        sample_every: steps between calls of ``on_sample``; 0 for none.
        on_sample: called with the step after it.
        title: name of the progress bar.

    Raises:
        Interrupted: a first SIGINT or SIGTERM arrived; the state was saved at the end of the step.
        FileExistsError, ValueError: see ``resume``; and a damaged checkpoint, which is named.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / CHECKPOINT
    devices = [trainer.device] if trainer.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), _signals() as stop:
        # Dropout draws from PyTorch's own generator; everything else from the trainer's.
        torch.manual_seed(int(trainer.settings["seed"]))
        if path.exists() and not resume:
            raise FileExistsError(f"{path} exists: continue it with --resume, or choose another --out")
        if path.exists():
            _restore(trainer, path)
        rows = _read_metrics(out / METRICS, trainer.step)
        started, first = time.perf_counter(), trainer.step
        saved = trainer.step if path.exists() else -1
        with progress.bar(steps, title, "step", initial=trainer.step) as bar:
            while trainer.step < steps and not stop.is_set():
                metrics = trainer.advance()
                bar.update()
                step = trainer.step
                if step % log_every == 0 or step == steps:
                    values = {name: float(value) for name, value in metrics.items()}
                    rate = (step - first) / (time.perf_counter() - started)
                    rows.append({"step": step, **values, "steps_per_second": round(rate, 3)})
                    bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()}, refresh=False)
                if sample_every and on_sample and (step % sample_every == 0 or step == steps):
                    on_sample(step)
                if step % checkpoint_every == 0:
                    _save(trainer, path, rows, out)
                    saved = step
        if saved != trainer.step:
            _save(trainer, path, rows, out)
        if stop.is_set() and trainer.step < steps:
            raise Interrupted(f"interrupted at step {trainer.step} of {steps}; continue with --resume")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint on the CPU.

    Raises:
        ValueError: the file is truncated, or not one of ours.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"no such file: {path}") from None
    except Exception as error:  # torch raises half a dozen types, depending on where the file ends
        reason = " ".join(str(error).split())[:120]
        raise ValueError(
            f"{path} is truncated or not a checkpoint ({type(error).__name__}: {reason})"
        ) from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of defgan_fast training")
    return checkpoint


def _save(trainer: Trainer, path: Path, rows: list[dict[str, Any]], out: Path) -> None:
    random: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if trainer.device.type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state(trainer.device)
    buffer = io.BytesIO()
    torch.save(
        {
            "format": FORMAT,
            "settings": trainer.settings,
            "step": trainer.step,
            "random": random,
            "trainer": trainer.state(),
        },
        buffer,
    )
    # Metrics first: rows after the checkpoint's step are dropped on resumption, missing ones would be lost.
    _write_metrics(out / METRICS, rows)
    write_atomically(path, buffer.getvalue())


def _restore(trainer: Trainer, path: Path) -> None:
    checkpoint = load_checkpoint(path)
    for name, value in trainer.settings.items():
        before = checkpoint["settings"].get(name)
        if before != value:
            raise ValueError(f"{path} was made with {name} {before!r}, got {name} {value!r}")
    trainer.restore(checkpoint["trainer"])
    trainer.step = checkpoint["step"]
    torch.set_rng_state(checkpoint["random"]["cpu"])
    if trainer.device.type == "cuda" and "cuda" in checkpoint["random"]:
        torch.cuda.set_rng_state(checkpoint["random"]["cuda"], trainer.device)


def _read_metrics(path: Path, step: int) -> list[dict[str, Any]]:
    """Rows up to ``step``; none of a new run."""
    if step == 0 or not path.exists():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if int(row["step"]) <= step]


def _write_metrics(path: Path, rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())


@contextmanager
def _signals() -> Iterator[threading.Event]:
    """Turn the first SIGINT or SIGTERM into an event, so that a step is never torn; a second one kills."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before: dict[int, Any] = {}

    def request(number: int, frame: Any) -> None:
        stop.set()
        signal.signal(number, before[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, request)
    try:
        yield stop
    finally:
        for handled, handler in before.items():
            signal.signal(handled, handler)
