"""Random and damaged plans, weight files, data files and checkpoints: one line, no crash, and little memory.

The inputs are the same at every run; `DEFGAN_FUZZ_EXAMPLES=100000` tries more of them.
"""

from __future__ import annotations

import functools
import gzip
import os
import resource
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from defgan_fast import models, weights
from defgan_fast.data import idx
from defgan_fast.kernels import ops
from defgan_fast.plan import lower
from defgan_fast.training import loop

EXAMPLES = int(os.environ.get("DEFGAN_FUZZ_EXAMPLES", "150"))
# Beyond what is in use when a test begins; the files have a few kilobytes, and torch's own tables some megabytes.
MEMORY = 300_000  # kilobytes

fuzzed = settings(
    max_examples=EXAMPLES,
    derandomize="DEFGAN_FUZZ_EXAMPLES" not in os.environ,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(autouse=True)
def _little_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY


def refused(call):
    """Calls, and checks that an error is one line of a kind that users are promised; returns whether there was one."""
    try:
        call()
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        text = str(error)
        assert text
        assert "\n" not in text, text
        assert len(text) < 2000, text
        return True
    return False


# --- plans --------------------------------------------------------------------------------------------------

EXTENTS = st.sampled_from(
    [0, 1, 2, 3, 4, 7, 8, -1, 255, 65535, 65536, 65537, 2**24, 2**31 - 1, 2**31, -(2**31), 2**63, 10**30]
)
SMALL = st.integers(-1, 6)
NUMBERS = st.sampled_from(["0.2", "-1", "nan", "inf", "1e999", "1e-999", "0x10", "", " ", "1,5", "1e5e5"])


def joined(separator, count):
    return st.lists(st.one_of(SMALL, EXTENTS), min_size=count, max_size=count).map(
        lambda values: separator.join(map(str, values))
    )


ATTRIBUTE = st.one_of(
    st.tuples(st.sampled_from(["in", "out"]), joined("x", 3)),
    st.tuples(st.sampled_from(["kernel", "stride", "pad", "upsample"]), joined("x", 2)),
    st.tuples(st.sampled_from(["weight", "bias"]), st.one_of(SMALL, EXTENTS).map(str)),
    st.tuples(st.just("norm"), joined(",", 4)),
    st.tuples(st.sampled_from(["slope", "eps"]), NUMBERS),
    st.tuples(
        st.just("activation"), st.sampled_from(["relu", "sigmoid", "tanh", "leaky_relu", "identity", "gelu"])
    ),
    st.tuples(st.text(max_size=6), st.text(max_size=6)),
).map("=".join)
LINE = st.tuples(
    st.sampled_from(["linear", "conv", "conv_transpose", "map", "reorder", "image", "gelu", ""]),
    st.lists(ATTRIBUTE, max_size=9),
).map(lambda parts: " ".join([parts[0], *parts[1]]))


@functools.cache
def small():
    """A small generator, its parameters and the text of its plan."""
    torch.manual_seed(0)
    generator = models.Generator(latent_size=4, width=1).eval()
    plan = lower(generator, 4)
    return plan.text, [p.detach() for p in plan.tensors(generator)]


@st.composite
def plans(draw):
    """Valid plans with some words or lines exchanged, and plans of nothing but random lines."""
    if draw(st.booleans()):
        return "\n".join(draw(st.lists(LINE, max_size=5)))
    lines = [line.split() for line in small()[0].splitlines()]
    for _ in range(draw(st.integers(1, 4))):
        line = draw(st.sampled_from(lines))
        if not line:
            continue
        place = draw(st.integers(0, len(line) - 1))
        kind = draw(st.integers(0, 4))
        if kind == 0:
            line[place] = draw(ATTRIBUTE)
        elif kind == 1:
            del line[place]
        elif kind == 2:
            key = line[place].partition("=")[0]
            line[place] = f"{key}={draw(joined('x', draw(st.integers(1, 3))))}"
        elif kind == 3:
            lines.insert(draw(st.integers(0, len(lines))), draw(LINE).split())
        else:
            lines.remove(line)
            lines = lines or [[]]
    return "\n".join(" ".join(line) for line in lines)


@pytest.mark.skipif(not ops.kernels_available, reason="needs the compiled kernels")
@fuzzed
@given(plans(), st.integers(0, 6), st.integers(-1, 3))
def test_plans(plan, k, rows):
    _, parameters = small()
    images = torch.rand(1, 1, 28, 28)
    refused(lambda: torch.ops.defgan_fast.decode(torch.zeros(1, k), parameters, plan, rows))
    refused(
        lambda: ops.project(
            images, torch.zeros(1, k), parameters, plan, [1.0], 0.5, "float32", max(rows, 0), True
        )
    )


@pytest.mark.skipif(not ops.kernels_available, reason="needs the compiled kernels")
@fuzzed
@given(st.text(max_size=200))
def test_plans_of_any_text(plan):
    assert refused(lambda: torch.ops.defgan_fast.decode(torch.zeros(1, 4), small()[1], plan, 0))


# --- files --------------------------------------------------------------------------------------------------


@st.composite
def damaged(draw, content: bytes):
    """Content with bytes changed, numbers overwritten, a piece cut out or put in, or its end lost."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        # The first kilobyte has the headers.
        place = draw(st.one_of(st.integers(0, min(len(changed), 1024)), st.integers(0, len(changed))))
        kind = draw(st.integers(0, 4))
        if kind == 0 and place < len(changed):
            changed[place] = draw(st.integers(0, 255))
        elif kind == 1:
            number = draw(st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1]))
            changed[place : place + 8] = struct.pack("<Q", number)
        elif kind == 2:
            del changed[place : place + draw(st.integers(1, 64))]
        elif kind == 3:
            changed[place:place] = draw(st.binary(max_size=32))
        else:
            del changed[place:]
    return bytes(changed)


@functools.cache
def weight_file(folder: Path) -> bytes:
    path = folder / "good.safetensors"
    weights.save(models.Generator(latent_size=4, width=1), path, {"seed": 0})
    return path.read_bytes()


@fuzzed
@given(st.data())
def test_weight_files(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    content = data.draw(st.one_of(damaged(weight_file(folder)), st.binary(max_size=64)))
    path = folder / "damaged.safetensors"
    path.write_bytes(content)
    refused(lambda: weights.load_generator(path))
    refused(lambda: weights.read_card(path))


@fuzzed
@given(st.data())
def test_data_files(tmp_path_factory, data):
    """None has the official content, so that every one is refused."""
    folder = tmp_path_factory.getbasetemp() / "mnist"
    folder.mkdir(exist_ok=True)
    part = idx.FILES["test"][1]
    name = data.draw(st.sampled_from([f"{part.file}.gz", part.file, "mnist.npz"]))
    raw = part.header + bytes(1000)
    content = data.draw(
        damaged(gzip.compress(raw) if name.endswith("gz") else npz() if "npz" in name else raw)
    )
    for old in folder.iterdir():
        old.unlink()
    (folder / name).write_bytes(content)
    assert refused(lambda: idx._official_array("mnist", part, folder))


@functools.cache
def npz() -> bytes:
    import io

    import numpy as np

    buffer = io.BytesIO()
    np.savez_compressed(buffer, y_test=np.zeros(10_000, np.uint8))
    return buffer.getvalue()


class Small:
    """The least that the loop asks of a trainer."""

    settings = {"seed": 0}  # noqa: RUF012
    device = torch.device("cpu")

    def __init__(self):
        self.step = 0
        self.weights = torch.zeros(3)

    def advance(self):
        self.step += 1
        self.weights += 1
        return {"loss": self.weights.sum()}

    def state(self):
        return {"weights": self.weights, "adam": {"state": {0: {"step": torch.zeros(1)}}}}

    def restore(self, state):
        self.weights = state["weights"] + torch.zeros(3)


@functools.cache
def checkpoint(folder: Path) -> bytes:
    loop.run(Small(), 2, folder / "good")
    return (folder / "good" / loop.CHECKPOINT).read_bytes()


@fuzzed
@given(st.data())
def test_checkpoints(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    content = data.draw(st.one_of(damaged(checkpoint(folder)), st.binary(max_size=64)))
    (folder / loop.CHECKPOINT).write_bytes(content)
    refused(lambda: loop._restore(Small(), folder / loop.CHECKPOINT, None))
