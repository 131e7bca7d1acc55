#!/usr/bin/env python3
"""Records the bits of a fixed set of projections and decodes, and tells which of them another state changes.

A change that only moves code must leave every bit as it is. This script writes one SHA-256 hash for each result
(latents, errors, images) into a JSON file: of the CPU kernels for every instruction set of this machine, in float32 and
bfloat16, and of the CUDA kernels' sources in the CPU execution, for every mapping and precision. Bits depend on the
machine and on PyTorch, which make the inputs, so both files of a comparison come from one machine.

    python tools/record_bits.py --out before.json      # in the state before
    python tools/record_bits.py --compare before.json  # in the state after: exits with 1 where bits differ

The package is the one that Python imports (PYTHONPATH), the generators are those of its `python_tests`. A plan is taken
from the arguments of the op that a `Projector` calls, so that nothing here depends on how the package is divided.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import defgan_fast as dg
from defgan_fast import _C

ROOT = Path(dg.__file__).resolve().parents[1]
SHIPPED = ("digits", "mnist", "fashion_mnist")
PRECISIONS = {"cpu": ("float32", "bfloat16"), "cuda": ("float32", "float16", "bfloat16")}
SHARED_ROWS = ("digits", "upsampling-a")  # also with two threads; their barriers are slow on a busy machine
SPLIT_FAMILIES = ("linear-a", "unfoldable-norm-a")
# Generators with every kind of stage. The CUDA kernels meet nothing new in the others of python_tests/generators.py.
CUDA_FAMILIES = (
    "paper",
    "tensorflow",
    "transposed-a",
    "rectangular-a",
    "linear-a",
    "one-pixel-a",
    "upsampling-a",
    "upsampling-b",
    "unfoldable-norm-a",
    "latent-as-map",
    "flattened",
    "many-channels",
    "many-positions-and-taps",
)
IMAGES, RESTARTS, STEPS, MOMENTUM = 4, 4, 3, 0.7
RATE = 10.0  # of the shipped generators


@dataclass
class Inputs:
    """One generator with what is projected by it.

    Attributes:
        images: targets [4, C, H, W].
        z0: starting points [4, k].
        rate: the learning rate of every step.
        parameters: the tensors that the plan numbers.
        plan: the lowered generator's text.
    """

    images: Tensor
    z0: Tensor
    rate: float
    parameters: list[Tensor]
    plan: str


class _OpArguments(TorchDispatchMode):
    """Keeps the arguments of the op that projects."""

    arguments: tuple[Any, ...] = ()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.defgan_fast.project.default:
            self.arguments = args
        return func(*args, **(kwargs or {}))


def find(name: str) -> Path:
    """Returns the folder below python_tests that has the file of that name."""
    found = sorted((ROOT / "python_tests").rglob(name))
    if not found:
        raise FileNotFoundError(f"no such file: {name} below {ROOT / 'python_tests'}")
    return found[0].parent


@functools.cache
def test_module(name: str) -> Any:
    """Imports a helper of the tests, wherever below python_tests it lies."""
    sys.path.insert(0, str(find(f"{name}.py")))
    return __import__(name)


@functools.cache
def inputs_of(name: str) -> Inputs:
    """Makes the inputs of a shipped generator or of a random one of the tests, from fixed seeds."""
    if name in SHIPPED:
        generator, rate = dg.load_generator(name), RATE
        k = next(p.shape[1] for p in generator.parameters() if p.dim() == 2)
        random = torch.Generator().manual_seed(0)
        z0 = torch.randn(RESTARTS, k, generator=random) / k**0.5
        with torch.no_grad():
            images = generator(torch.randn(IMAGES, k, generator=random)).reshape(IMAGES, 1, 28, 28)
    else:
        case = test_module("generators").make_case(name)
        generator, images, z0, rate = case.generator, case.images, case.z0, case.lr
    mode = _OpArguments()
    with torch.no_grad(), mode:
        dg.Projector(generator, steps=1, restarts=RESTARTS, backend="cpu").project(images, z0=z0)
    _, _, parameters, plan = mode.arguments[:4]
    return Inputs(images.contiguous(), z0, rate, [p.detach().clone() for p in parameters], plan)


def digest(*tensors: Tensor) -> str:
    """Returns the SHA-256 hash of the tensors' shapes and bytes."""
    hashed = hashlib.sha256()
    for tensor in tensors:
        hashed.update(repr(tuple(tensor.shape)).encode())
        hashed.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


def shapes_of(inputs: Inputs) -> dict[str, dict[str, Any]]:
    """Returns the calls to make: all rows, fewer in flight, one row, starting points of each image's own."""
    images, z0 = inputs.images, inputs.z0
    return {
        "16 rows": {"images": images, "z0": z0},
        "16 rows, 5 in flight": {"images": images, "z0": z0, "max_rows": 5},
        "3 rows": {"images": images[:1], "z0": z0[:3]},
        "1 row": {"images": images[1:2], "z0": z0[2:3]},
        "own starts": {"images": images[:2], "z0": torch.stack([z0, z0.flip(0)])},
    }


def record_cpu(name: str) -> Iterator[tuple[str, str]]:
    """Yields name and hash of every result of the CPU kernels on one generator."""
    inputs = inputs_of(name)
    ops, rates = torch.ops.defgan_fast, [inputs.rate] * STEPS
    yield f"inputs/{name}", digest(inputs.images, inputs.z0, torch.tensor(rates), *inputs.parameters)
    yield f"plan/{name}", hashlib.sha256(inputs.plan.encode()).hexdigest()
    latents = torch.cat([inputs.z0, -inputs.z0, 2 * inputs.z0])
    calls = shapes_of(inputs)
    many = {"images": inputs.images.repeat(3, 1, 1, 1), "z0": latents}  # several blocks and tiles of rows
    if name == "fashion_mnist":  # the plan of mnist
        calls = {call: calls[call] for call in ("16 rows", "1 row")}
    if name not in SHIPPED:
        calls["144 rows"] = many
    for isa in _C.instruction_sets():
        os.environ["DEFGAN_CPU_ISA"] = isa
        assert _C.active_instruction_set() == isa
        for precision in PRECISIONS["cpu"]:
            for call, arguments in calls.items():
                got = ops.project(
                    arguments["images"],
                    arguments["z0"],
                    inputs.parameters,
                    inputs.plan,
                    rates,
                    MOMENTUM,
                    precision,
                    arguments.get("max_rows", 0),
                    False,
                )
                yield f"cpu/{isa}/{precision}/{name}/{call}", digest(*got)
        if name in SHARED_ROWS:
            torch.set_num_threads(2)
            for call in ("16 rows", "1 row"):
                got = ops.project(
                    *calls[call].values(),
                    inputs.parameters,
                    inputs.plan,
                    rates,
                    MOMENTUM,
                    "float32",
                    0,
                    False,
                )
                yield f"cpu/{isa}/float32/{name}/{call}, 2 threads", digest(*got)
            torch.set_num_threads(1)
        for count, max_rows in ((12, 0), (12, 5), (1, 0)):
            images = ops.decode(latents[:count], inputs.parameters, inputs.plan, max_rows)
            yield f"cpu/{isa}/decode/{name}/{count} rows, {max_rows or 'all'} in flight", digest(images)
    del os.environ["DEFGAN_CPU_ISA"]


def record_cuda(name: str) -> Iterator[tuple[str, str]]:
    """Yields name and hash of every result of the CUDA sources, executed on the CPU, on one generator."""
    inputs, on_cpu = inputs_of(name), test_module("on_cpu")
    kernels = on_cpu.kernels()
    generator = {"parameters": inputs.parameters, "plan": inputs.plan}
    # Executing a kernel thread by thread takes seconds, so these are the fewest calls that reach every stage.
    mappings = (
        ["fused"] if name in SHIPPED else ["layered", "split"] if name in SPLIT_FAMILIES else ["layered"]
    )
    for precision in PRECISIONS["cuda"]:
        for mapping in mappings:
            if mapping not in on_cpu.MAPPINGS or (mapping, precision) == ("fused", "float32"):
                continue
            got = kernels.project(
                inputs.images[:1],
                inputs.z0[:2],
                **generator,
                rates=[inputs.rate],
                momentum=MOMENTUM,
                precision=precision,
                mapping=mapping,
                blocks=2,
            )
            yield f"cuda/{mapping}/{precision}/{name}", digest(got.latents, got.errors)
    if name in SPLIT_FAMILIES:
        images = kernels.decode(inputs.z0[:2], shape=inputs.images.shape[1:], **generator)
        yield f"cuda/decode/{name}", digest(images)


def record(kind: str, name: str) -> dict[str, str]:
    """Makes one part of the record; runs in a process of its own."""
    torch.set_num_threads(1)  # the parts share the processor
    with torch.no_grad():
        return dict((record_cpu if kind == "cpu" else record_cuda)(name))


def record_all(only: str) -> dict[str, str]:
    """Makes the record of the parts whose name, such as "cpu/mnist", matches the pattern."""
    families = [*SHIPPED, *test_module("generators").FAMILIES]
    parts = [("cpu", name) for name in families] + [("cuda", name) for name in ("digits", *CUDA_FAMILIES)]
    parts = [part for part in parts if fnmatch.fnmatch("/".join(part), only)]
    if any(kind == "cuda" for kind, _ in parts):
        test_module("on_cpu").kernels()  # compiled once, before several processes ask for it
    made: dict[str, str] = {}
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(record, *part) for part in parts]
        for done, (part, future) in enumerate(zip(parts, futures, strict=True)):
            made |= future.result()
            print(f"{done + 1}/{len(parts)} {'/'.join(part)}", file=sys.stderr, flush=True)
    return made


def compare(before: dict[str, Any], after: dict[str, Any], only: str) -> int:
    """Prints what differs; returns the exit status."""
    for key in ("machine", "torch"):
        if before[key] != after[key]:
            print(f"not comparable: {key} was {before[key]}, is {after[key]}")
            return 1
    old, new = before["bits"], after["bits"]
    changed = sorted(key for key in old.keys() & new.keys() if old[key] != new[key])
    missing = sorted(old.keys() - new.keys()) if only == "*" else []
    for key in changed:
        print(f"differs: {key}")
    for key in missing:
        print(f"missing: {key}")
    print(
        f"{len(old.keys() & new.keys())} results compared, {len(changed)} differ, {len(missing)} are missing"
    )
    return 1 if changed or missing or not new else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where to write the record")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="a record of the state before")
    parser.add_argument("--only", default="*", help='a pattern of parts, such as "cpu/*" or "cuda/linear-a"')
    arguments = parser.parse_args()
    if not arguments.out and not arguments.compare:
        parser.error("give --out, --compare or both")
    print(f"bits of {ROOT}", file=sys.stderr)
    processor = next(
        (line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), ""
    )
    made = {
        "machine": f"{platform.machine()} {processor.partition(':')[2].strip()}",
        "torch": torch.__version__,
        "bits": record_all(arguments.only),
    }
    if arguments.out:
        written = arguments.out.with_suffix(".tmp")
        written.write_text(json.dumps(made, indent=1, sort_keys=True) + "\n")
        written.replace(arguments.out)
    return (
        compare(json.loads(arguments.compare.read_text()), made, arguments.only) if arguments.compare else 0
    )


if __name__ == "__main__":
    sys.exit(main())
