#!/usr/bin/env python3
"""Compiles every CUDA kernel for every architecture and judges what the compiler says; needs nvcc, but no GPU.

For each source and architecture: nvcc to PTX, whose directives tell a kernel's launch bounds, then ptxas, whose
report has registers, spills, stack and shared memory. A kernel fails for registers that its launch bounds cannot
have, for spills or stack beyond a stated allowance, for static shared memory beyond what a block gets without asking
for more, and for any warning of either tool, those about serialised tensor-core instructions (C7510 to C7519) by
name, and for a path that the compiler has cut off as impossible. Prints a table, writes JSON. Nothing but the standard
library, so it runs before anything is installed.

    python3 tools/cuda_check.py [--arch 90 ...] [--jobs N] [--json FILE] [FILE.cu ...]
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
# Fused kernels want more shared memory than the other architectures have; their bodies are empty there.
ONLY = {"fused*.cu": (90, 100)}

REGISTERS = 65_536  # of a multiprocessor, on all of these architectures
REGISTERS_OF_A_THREAD = 255
STATIC_SHARED = 48 * 1024  # more has to be asked for at launch
# Bytes, by source. A spilled word is a round trip to L1. The fused kernels' largest functions have sums that leave so
# few registers that some are saved where a function begins, ends or goes to the next tap: 116 bytes at most, none
# within the loops of products (seen in the disassembly: no LDL or STL between a loop's first and last HMMA).
ALLOWED_SPILLS = {"fused*.cu": 128}
# A kernel that calls functions which are not inlined keeps what it hands to them by reference, or saves around them, on
# the stack, outside of their loops.
ALLOWED_STACK = {"fused*.cu": 192, "*": 128}
SERIALISED = re.compile(r"C75(?:1[0-9])")


@dataclass
class Function:
    """Holds what ptxas says of one kernel, or of one function that kernels call."""

    source: str
    architecture: int
    name: str
    kernel: bool
    registers: int | None = None  # None for a function: its caller's count has them
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    shared: int = (
        0  # static; what a launch asks for beside it is asserted where it is computed (geometries.h)
    )
    threads: int | None = None  # of a block, by the launch bounds
    blocks: int = 1  # of a multiprocessor, by the launch bounds
    failures: list[str] = field(default_factory=list)


@dataclass
class Unit:
    """Holds what the tools say of one source for one architecture."""

    source: str
    architecture: int
    seconds: float
    functions: list[Function]
    failures: list[str]  # that belong to no function: errors and warnings


def part_of_package(path: str) -> ModuleType:
    """Loads one file of `defgan_fast/` by its path: importing the package would import torch."""
    name = "defgan_fast_" + Path(path).stem
    spec = importlib.util.spec_from_file_location(name, ROOT / "defgan_fast" / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


def launch_bounds(ptx: str) -> dict[str, tuple[int | None, int]]:
    """Returns each kernel's threads of a block (None where PTX does not say) and blocks of a multiprocessor."""
    found = {}
    for entry in re.finditer(r"\.entry\s+([\w$]+)\s*\(.*?\)(.*?)\{", ptx, re.DOTALL):
        threads = re.search(r"\.(?:maxntid|reqntid)\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", entry[2])
        blocks = re.search(r"\.minnctapersm\s+(\d+)", entry[2])
        count = None
        if threads:
            count = int(threads[1]) * int(threads[2] or 1) * int(threads[3] or 1)
        found[entry[1]] = (count, int(blocks[1]) if blocks else 1)
    return found


def dead_ends(ptx: str) -> list[str]:
    """The functions of a PTX text with a path that neither returns nor jumps: the compiler thinks it impossible.

    What a program does where it has no defined behaviour is cut off like this, and what nvcc mistakes for it. Seen is
    the last block of a function, where nvcc 13.0 puts what it has cut.
    """
    found = []
    for function in re.finditer(
        r"^(?:\.visible |\.weak )*\.(?:entry|func)\b[^;{]*?([\w$]+)\s*\(", ptx, re.MULTILINE
    ):
        body = ptx[function.end() : ptx.find("\n}", function.end())]
        if "{" not in body or ";" in body[: body.index("{")]:
            continue  # a declaration
        lines = [line.strip() for line in body.splitlines()]
        code = [line for line in lines if line and not line.startswith(("//", ".loc", ".pragma"))]
        if not code or not re.match(r"(ret|exit|trap|bra|brx)\b", code[-1]):
            found.append(function[1])
    return found


def parse_ptxas(report: str, source: str, architecture: int) -> list[Function]:
    """Returns the functions in what `ptxas -v` prints."""
    functions: dict[str, Function] = {}
    kernels = set(re.findall(r"Compiling entry function '([^']+)'", report))
    current = kernel = None
    for line in report.splitlines():
        named = re.search(r"(Function properties for|Compiling entry function) '?([\w$]+)'?", line)
        if named:
            name = named[2]
            current = functions.setdefault(name, Function(source, architecture, name, name in kernels))
            kernel = current if current.kernel else kernel
        if current is None:
            continue
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line)
        if frame:
            current.stack, current.spill_stores, current.spill_loads = map(int, frame.groups())
        used = re.search(r"Used (\d+) registers", line)
        if used and kernel is not None:  # the kernel's, whichever function it calls was named in between
            shared = re.search(r"(\d+) bytes smem", line)
            kernel.registers, kernel.shared = int(used[1]), int(shared[1]) if shared else 0
    return list(functions.values())


def warnings_in(text: str) -> list[str]:
    """Returns the warnings and errors of a tool's output; serialised tensor-core instructions are named."""
    found = []
    for line in text.splitlines():
        serialised = SERIALISED.search(line)
        if serialised:
            found.append(f"serialised tensor-core instructions ({serialised[0]}): {line.strip()}")
        elif re.search(r"\b(warning|error|fatal)\b", line, re.IGNORECASE) and "can be suppressed" not in line:
            found.append(line.strip())
    return found


def allowance(allowed: dict[str, int], source: str) -> int:
    """Returns what the first pattern that fits the source's name allows."""
    return next((most for pattern, most in allowed.items() if fnmatch.fnmatch(source, pattern)), 0)


def judge(function: Function) -> list[str]:
    """Says in words what is wrong with a function."""
    wrong = []
    spills, stack = (allowance(allowed, function.source) for allowed in (ALLOWED_SPILLS, ALLOWED_STACK))
    spilled = function.spill_stores + function.spill_loads
    if spilled > spills:
        wrong.append(f"spills {spilled} bytes, allowed {spills}")
    if function.stack > stack:
        wrong.append(f"has a stack frame of {function.stack} bytes, allowed {stack}")
    if not function.kernel or function.registers is None:
        return wrong
    most = REGISTERS_OF_A_THREAD
    if function.threads:
        warps = -(-function.threads // 32)
        most = min(most, REGISTERS // (warps * 32 * function.blocks) // 8 * 8)  # given out by eights
    else:
        wrong.append("has no launch bounds: the compiler guesses how many registers it may use")
    if function.registers > most:
        bounds = f"{function.threads} threads x {function.blocks} blocks a multiprocessor"
        wrong.append(f"uses {function.registers} registers, {bounds} leave {most}")
    if function.shared > STATIC_SHARED:
        wrong.append(f"has {function.shared} bytes of static shared memory, at most {STATIC_SHARED}")
    return wrong


def run(command: list[str]) -> tuple[int, str]:
    """Runs a command and returns its exit status, and both streams together."""
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    return finished.returncode, finished.stdout + finished.stderr


def check_unit(
    nvcc: str, ptxas: str, flags: list[str], source: Path, architecture: int, folder: Path
) -> Unit:
    """Compiles one source for one architecture and judges it."""
    start = time.perf_counter()
    ptx, cubin = (folder / f"{source.stem}-{architecture}{suffix}" for suffix in (".ptx", ".cubin"))
    compile_ptx = [
        nvcc,
        *flags,
        "-std=c++17",
        f"-I{CSRC}",
        f"-arch=compute_{architecture}",
        "--ptx",
        "-o",
        str(ptx),
    ]
    status, said = run([*compile_ptx, str(source)])
    failures = warnings_in(said)
    functions: list[Function] = []
    if status != 0:
        failures.append(f"nvcc failed with status {status}")
    else:
        text = ptx.read_text()
        bounds = launch_bounds(text)
        failures += [
            f"a path of {name} ends nowhere: it was taken for impossible" for name in dead_ends(text)
        ]
        status, said = run(
            [ptxas, "-v", "-O3", "-lineinfo", f"-arch=sm_{architecture}", "-o", str(cubin), str(ptx)]
        )
        failures += warnings_in(said)
        if status != 0:
            failures.append(f"ptxas failed with status {status}")
        functions = parse_ptxas(said, source.name, architecture)
        if bounds and not any(function.kernel for function in functions):
            failures.append("ptxas reported no kernel: its output is not what this script can read")
        for function in functions:
            function.threads, function.blocks = bounds.get(function.name, (None, 1))
            function.failures = judge(function)
    return Unit(source.name, architecture, time.perf_counter() - start, functions, failures)


def applies(source: Path, architecture: int) -> bool:
    """Tells whether a source has kernels for an architecture."""
    return all(
        architecture in only for pattern, only in ONLY.items() if fnmatch.fnmatch(source.name, pattern)
    )


def readable(names: list[str]) -> dict[str, str]:
    """Returns C++ names without their parameters, where the binutils are there to tell them."""
    filt = shutil.which("c++filt")
    if filt is None or not names:
        return {name: name for name in names}
    said = subprocess.run(
        [filt, "-p"], input="\n".join(names), capture_output=True, text=True, check=False
    ).stdout
    short = (
        re.sub(r"\b(?:defgan::cuda::|\(anonymous namespace\)::)", "", line) for line in said.splitlines()
    )
    return dict(zip(names, short, strict=False))


def table(units: list[Unit]) -> str:
    """Returns a table with one line for each function."""
    names = readable(sorted({f.name for unit in units for f in unit.functions}))
    header = ("source", "sm", "function", "registers", "stack", "spills", "shared", "bounds")
    rows = [header]
    for unit in units:
        for f in sorted(unit.functions, key=lambda f: (not f.kernel, f.name)):
            bounds = f"{f.threads}x{f.blocks}" if f.threads else ""
            registers = str(f.registers) if f.kernel else ""
            cells = (registers, str(f.stack), str(f.spill_stores + f.spill_loads), str(f.shared), bounds)
            rows.append((unit.source, str(unit.architecture), names[f.name][:70], *cells))
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    left = (0, 2)

    def padded(i: int, cell: str) -> str:
        return cell.ljust(widths[i]) if i in left else cell.rjust(widths[i])

    return "\n".join("  ".join(padded(i, cell) for i, cell in enumerate(row)) for row in rows)


def main(argv: list[str] | None = None) -> int:
    """Returns 0 where everything compiles within the gates, 1 where not, 2 where there is no nvcc."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("sources", nargs="*", type=Path, help="default: every csrc/cuda/*.cu")
    parser.add_argument("--arch", type=int, action="append", help="80, 86, ...; default: all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at a time")
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "cuda-check.json")
    parser.add_argument(
        "--without-nvcc", choices=("fail", "skip"), default="fail", help="what to do without nvcc"
    )
    args = parser.parse_args(argv)

    build = part_of_package("kernels/build.py")
    home = build.cuda_home()
    version = build.nvcc_version(home) if home else None
    if version is None:
        where = f"in {home}" if home else "on PATH, in $CUDA_HOME or /usr/local/cuda"
        print(f"cuda-check: no nvcc {where}: nothing was checked", file=sys.stderr)
        return 0 if args.without_nvcc == "skip" else 2
    sources = [path.resolve() for path in args.sources] or build.cuda_source_files(CSRC)
    missing = [str(path) for path in sources if not path.is_file()]
    if missing or not sources:
        print(
            f"cuda-check: no such file: {missing[0]}" if missing else "cuda-check: no sources",
            file=sys.stderr,
        )
        return 1

    start = time.perf_counter()
    work = [
        (source, arch) for source in sources for arch in args.arch or ARCHITECTURES if applies(source, arch)
    ]
    nvcc, ptxas = (str(Path(home) / "bin" / tool) for tool in ("nvcc", "ptxas"))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        units = list(
            pool.map(lambda item: check_unit(nvcc, ptxas, build.NVCC_FLAGS, *item, Path(folder)), work)
        )
    seconds = time.perf_counter() - start

    print(table(units))
    failures = [f"{u.source} for sm_{u.architecture}: {line}" for u in units for line in u.failures]
    names = readable(sorted({f.name for u in units for f in u.functions}))
    failures += [
        f"{u.source} for sm_{u.architecture}: {names[f.name]} {line}"
        for u in units
        for f in u.functions
        for line in f.failures
    ]
    kernels = sum(f.kernel for u in units for f in u.functions)
    print(
        f"\n{kernels} kernels in {len(units)} units, CUDA {version}, {seconds:.0f} s; {len(failures)} failures"
    )
    for line in failures:
        print(f"cuda-check: {line}", file=sys.stderr)
    result = {"cuda": version, "flags": build.NVCC_FLAGS, "seconds": round(seconds, 1), "failures": failures}
    result["units"] = [asdict(unit) for unit in units]
    part_of_package("files.py").write_json(args.json, result, indent=1)
    return 1 if failures or not kernels else 0


if __name__ == "__main__":
    raise SystemExit(main())
