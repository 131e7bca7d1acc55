"""The loop around every trainer: progress bar, metrics, checkpoints, and a clean end at any moment.

A checkpoint holds everything that decides the following steps: weights, optimisers, random state and data
order, and what was measured on the way. It is written under a temporary name, flushed to the disk and renamed,
so that a run that was killed at any moment resumes from a whole one and ends with the same bits as a run that
was never stopped (on the same machine with the same number of threads). Of several processes the first writes.
"""

from __future__ import annotations

import csv
import importlib.util
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
from defgan_fast.files import write_atomically
from defgan_fast.finite import named_tensors, non_finite
from defgan_fast.training import distributed

CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.csv"
QUALITY = "quality.csv"
TENSORBOARD = "tensorboard"
FORMAT = "defgan_fast training 1"


class Interrupted(KeyboardInterrupt):
    """Training was stopped by a signal after saving; the message says at which step and how to go on."""


class NonFinite(RuntimeError):
    """A quantity of a training became NaN or infinite; the message names it, the step, and what was kept."""


class Trainer(Protocol):
    """What the loop needs of a trainer."""

    settings: dict[str, Any]
    device: torch.device
    step: int

    def advance(self) -> dict[str, torch.Tensor]:
        """Does one step and returns its metrics as tensors of one element (reading them may synchronise)."""

    def state(self) -> dict[str, Any]:
        """Returns everything that decides the following steps, except the random state of PyTorch itself."""

    def restore(self, state: dict[str, Any]) -> None:
        """Does the inverse of :meth:`state`."""


class Evaluator(Protocol):
    """What the loop needs of a measurement that is made during training."""

    rows: list[dict[str, Any]]  # one for each evaluation, its step first

    def evaluate(self, step: int) -> dict[str, float]:
        """Measures, appends to ``rows``, keeps what is best so far."""

    def state(self) -> dict[str, Any]:
        """Returns everything that later evaluations and the choice of the best depend on."""

    def restore(self, state: dict[str, Any]) -> None:
        """Does the inverse of :meth:`state`."""


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
    evaluate_every: int = 0,
    evaluator: Evaluator | None = None,
    title: str = "training",
) -> None:
    """Advances ``trainer`` until it has made ``steps`` steps, and leaves a checkpoint.

    Args:
        trainer: the trainer, fresh; its settings must equal those of the checkpoint it resumes from.
        steps: total number of steps, those before the resumption counted.
        out: folder for ``checkpoint.pt``, ``metrics.csv``, ``quality.csv``, and where the package tensorboard
            is installed, for its files; made if need be.
        resume: continue from the checkpoint in ``out`` if there is one. Without it a checkpoint in ``out``
            is an error, so that no finished run is overwritten by accident.
        checkpoint_every: steps between checkpoints.
        log_every: steps between rows of the metrics and updates of the bar.
        sample_every: steps between calls of ``on_sample``; 0 for none.
        on_sample: called with the step after it.
        evaluate_every: steps between evaluations, the last step always included; 0 for none.
        evaluator: see :class:`Evaluator`; called in the first process only.
        title: name of the progress bar.

    Raises:
        Interrupted: a first SIGINT or SIGTERM arrived; the state was saved at the end of the step.
        FileExistsError, ValueError: see ``resume``; and a damaged checkpoint, which is named.
        NonFinite: a metric, a weight or an optimiser's state is NaN or infinite. The last good checkpoint stays.
    """
    first_process = distributed.rank() == 0
    out.mkdir(parents=True, exist_ok=True)
    path = out / CHECKPOINT
    devices = [trainer.device] if trainer.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), _signals() as stop:
        # Dropout draws from PyTorch's own generator; everything else from the trainer's.
        torch.manual_seed(int(trainer.settings["seed"]))
        if path.exists() and not resume:
            raise FileExistsError(f"{path} exists: continue it with --resume, or choose another --out")
        resumed = path.exists()
        if resumed:
            _restore(trainer, path, evaluator)
        distributed.wait()
        rows = _read_metrics(out / METRICS, trainer.step)
        started, first = time.perf_counter(), trainer.step
        saved = trainer.step if resumed else -1

        def stop_at(found: str | None) -> None:
            if found is not None:
                kept = (
                    f"the checkpoint of step {saved} is kept" if saved >= 0 else "there is no checkpoint yet"
                )
                raise NonFinite(f"training stopped at step {trainer.step}: {found}; {kept}; try a lower lr")

        def save() -> None:
            nonlocal saved
            # Every process looks, at the same numbers, so that none waits for one that has stopped.
            stop_at(non_finite(named_tensors(trainer.state())))
            if first_process:
                _save(trainer, path, rows, out, evaluator)
            saved = trainer.step

        def evaluate_if_due() -> None:
            step = trainer.step
            if not (evaluator and evaluate_every and step) or (step % evaluate_every and step != steps):
                return
            if first_process and (not evaluator.rows or int(evaluator.rows[-1]["step"]) < step):
                # An evaluation may take as long as hundreds of steps: losing them would be worse.
                if saved != step:
                    save()
                with torch.random.fork_rng(devices=devices):
                    write(evaluator.evaluate(step), step)
                save()
            distributed.wait()

        with (
            progress.bar(steps, title, "step", initial=trainer.step, quiet=not first_process) as bar,
            _scalars(out, trainer.step, first_process) as write,
        ):
            evaluate_if_due()  # of a run that was stopped while it did
            while trainer.step < steps and not _stopped(stop, trainer, log_every):
                metrics = trainer.advance()
                bar.update()
                step = trainer.step
                # To look at every step would make the host wait for a GPU.
                if not devices or step % log_every == 0 or step == steps:
                    stop_at(non_finite(metrics.items()))
                if step % log_every == 0 or step == steps:
                    values = {name: float(value) for name, value in metrics.items()}
                    rate = (step - first) / (time.perf_counter() - started)
                    rows.append({"step": step, **values, "steps_per_second": round(rate, 3)})
                    bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()}, refresh=False)
                    write(values, step)
                if (
                    first_process
                    and sample_every
                    and on_sample
                    and (step % sample_every == 0 or step == steps)
                ):
                    on_sample(step)
                evaluate_if_due()
                if step % checkpoint_every == 0 and saved != step:
                    save()
        if saved != trainer.step:
            save()
        distributed.wait()
        if stop.is_set() and trainer.step < steps:
            raise Interrupted(f"interrupted at step {trainer.step} of {steps}; continue with --resume")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint on the CPU.

    Raises:
        ValueError: the file is truncated, or not one of ours.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"no such file: {path}") from None
    except Exception as error:  # torch raises half a dozen types, depending on where the file ends
        raise ValueError(f"{path} is truncated or not a checkpoint ({_shortened(error)})") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of defgan_fast training")
    types = {"settings": dict, "step": int, "random": dict, "trainer": dict}
    for key, expected in types.items():
        if not isinstance(checkpoint.get(key), expected):
            found = type(checkpoint.get(key)).__name__
            raise ValueError(f"{path} must hold {key} as {expected.__name__}, got {found}")
    return checkpoint


def _shortened(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def _stopped(stop: threading.Event, trainer: Trainer, every: int) -> bool:
    """Returns whether to stop here. Several processes have to agree, which costs a message: they ask now and then."""
    if distributed.world() == 1:
        return stop.is_set()
    if trainer.step % every:
        return False
    if distributed.any_true(stop.is_set(), trainer.device):
        stop.set()
    return stop.is_set()


@contextmanager
def _scalars(out: Path, step: int, wanted: bool) -> Iterator[Callable[[dict[str, float], int], None]]:
    """Writes values to TensorBoard where it is installed; what a stopped run wrote after ``step`` is hidden."""
    if not wanted or importlib.util.find_spec("tensorboard") is None:
        yield lambda values, step: None
        return
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(out / TENSORBOARD), purge_step=step + 1 if step else None)

    def write(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    try:
        yield write
    finally:
        writer.close()


def _save(
    trainer: Trainer, path: Path, rows: list[dict[str, Any]], out: Path, evaluator: Evaluator | None
) -> None:
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
            "evaluator": evaluator.state() if evaluator else None,
        },
        buffer,
    )
    # Metrics first: rows after the checkpoint's step are dropped on resumption, missing ones would be lost.
    _write_metrics(out / METRICS, rows)
    if evaluator:
        _write_metrics(out / QUALITY, evaluator.rows)
    write_atomically(path, buffer.getvalue())


def _restore(trainer: Trainer, path: Path, evaluator: Evaluator | None) -> None:
    checkpoint = load_checkpoint(path)
    # What only one of the two has differs, too.
    for name in {**trainer.settings, **checkpoint["settings"]}:
        value, before = trainer.settings.get(name), checkpoint["settings"].get(name)
        if before != value:
            raise ValueError(f"{path} was made with {name} {before!r}, got {name} {value!r}")
    bad = non_finite(named_tensors(checkpoint["trainer"]))
    if bad is not None:
        raise ValueError(f"{path} must hold finite numbers, got {bad}: delete it to begin anew")
    try:
        trainer.restore(checkpoint["trainer"])
        trainer.step = checkpoint["step"]
        if evaluator and checkpoint["evaluator"]:
            evaluator.restore(checkpoint["evaluator"])
        torch.set_rng_state(checkpoint["random"]["cpu"])
        if trainer.device.type == "cuda" and "cuda" in checkpoint["random"]:
            torch.cuda.set_rng_state(checkpoint["random"]["cuda"], trainer.device)
    except (KeyError, TypeError, IndexError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} does not fit this training ({_shortened(error)})") from None


def _read_metrics(path: Path, step: int) -> list[dict[str, Any]]:
    """Returns the rows up to ``step``; none of a new run."""
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
    """Turns the first SIGINT or SIGTERM into an event, so that a step is never torn; a second one kills."""
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
