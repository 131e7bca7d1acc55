"""The parts of gpu_check.py: what the card is and does at best, the build, the tests, the times, the profile.

Each part takes the findings that it fills, and is run in a process of its own. The tests' own results reach the
findings one by one, so that what a part had found is kept when its time is over.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from defgan_fast import files

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = Path(__file__).resolve().with_name("gpu_check.py")
FOLDER = "python_tests/kernels_cuda"
CORRECTNESS, OP_TESTS = f"{FOLDER}/test_correctness.py", f"{FOLDER}/test_cuda.py"


class Skip(Exception):
    """This part has nothing to run on here; the message says why."""


class Findings(dict):  # type: ignore[type-arg]
    """Holds what a part has found so far, and writes it at every step, since the part may be killed at any time."""

    def __init__(self, path: Path, budget: float) -> None:
        super().__init__(failures=[])
        self.path = path
        self.end = time.monotonic() + budget

    def save(self) -> None:
        files.write_json(self.path, dict(self), indent=1)

    def expect(self, true: bool, what: str) -> None:
        if not true:
            self["failures"].append(what)
            print(f"    FAILED: {what}", flush=True)
            self.save()

    def left(self) -> float:
        """Returns the seconds of the budget that remain."""
        return self.end - time.monotonic()


def output_of(command: list[str], timeout: float = 60) -> str:
    """Returns the standard output of a tool, empty where it is not there or fails."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=timeout
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def gpu_here() -> bool:
    import torch

    return torch.cuda.is_available()


class Recorder:
    """Is a pytest plugin that keeps what tests record, and each failure, as soon as a test has ended."""

    def __init__(self, found: Findings) -> None:
        self.found = found
        found |= {"tests_passed": 0, "tests_skipped": 0}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            said = getattr(report.longrepr, "reprcrash", None)
            self.found.expect(False, f"{report.nodeid}: {said.message if said else report.longrepr}"[:1500])
        if report.when == "call":
            self.found["tests_passed"] += report.passed
            for key, value in report.user_properties:
                if key in ("row", "redraw"):
                    self.found.setdefault(key + "s", []).append(value)
                else:
                    self.found[key] = value
        self.found["tests_skipped"] += report.skipped
        self.found.save()


def run_tests(found: Findings, *what: str) -> None:
    """Runs tests in this process."""
    import pytest

    status = pytest.main(
        [
            "-q",
            "-p",
            "no:cacheprovider",
            "-c",
            str(ROOT / "pyproject.toml"),
            *(str(ROOT / each) for each in what),
        ],
        plugins=[Recorder(found)],
    )
    said = f"pytest ended with status {int(status)}"
    found.expect(int(status) == 0 or bool(found["failures"]), said)


# --- the card -------------------------------------------------------------------------------------------------


def card(found: Findings) -> None:
    """Finds versions, and the limits that the card states."""
    import torch

    found["python"], found["torch"], found["torch_cuda"] = (
        sys.version.split()[0],
        torch.__version__,
        torch.version.cuda,
    )
    lines = output_of(["nvcc", "--version"]).splitlines()
    found["nvcc"] = lines[-1] if lines else None
    found["tools"] = {tool: shutil.which(tool) for tool in ("compute-sanitizer", "ncu")}
    if not gpu_here():
        found.save()
        raise Skip("torch sees no GPU")
    gpu = torch.cuda.get_device_properties(0)
    found["name"] = gpu.name
    found["capability"] = [gpu.major, gpu.minor]
    found["multiprocessors"] = gpu.multi_processor_count
    found["l2_bytes"] = gpu.L2_cache_size
    found["shared_bytes_of_a_block"] = gpu.shared_memory_per_block_optin
    found["memory_bytes"] = gpu.total_memory
    fields = "driver_version,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu,clocks.sm"
    said = output_of(["nvidia-smi", "-i", "0", f"--query-gpu={fields}", "--format=csv,noheader"])
    found["nvidia_smi"] = dict(zip(fields.split(","), said.split(", "), strict=False))


def ceilings(found: Findings) -> None:
    """Measures what the card does at best: a large product, L2, mma.sync, barriers."""
    import torch

    if not gpu_here():
        raise Skip("torch sees no GPU")
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.float16) for _ in range(2))
    rates = []
    for _ in range(13):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        torch.mm(a, b)
        stop.record()
        stop.synchronize()
        rates.append(2e-9 * n**3 / start.elapsed_time(stop))
    found["product_fp16_tflops"] = statistics.median(rates[3:])
    found.save()

    from defgan_fast.kernels import build

    home = build.cuda_home()
    if home is None:
        raise RuntimeError("no nvcc: the probes of L2, mma.sync and barriers were not built")
    major, minor = torch.cuda.get_device_capability(0)
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "gpu_probes"
        command = [f"{home}/bin/nvcc", "-std=c++17", "-O3", "--expt-relaxed-constexpr"]
        command += [f"-gencode=arch=compute_{major}{minor},code=sm_{major}{minor}", f"-I{ROOT / 'csrc'}"]
        subprocess.run([*command, str(ROOT / "bench" / "gpu_probes.cu"), "-o", str(program)], check=True)
        said = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
    found.update(json.loads(said))


def build(found: Findings) -> None:
    """Builds the extension as a first import does; where it is built already, nothing is left to do."""
    start = time.monotonic()
    import torch

    from defgan_fast.kernels import extension, ops

    extension.load()
    found["seconds"] = round(time.monotonic() - start, 1)
    found["status"] = {key: value for key, value in extension.status().items() if key != "path"}
    found.expect(ops.kernels_available, f"no kernels: {extension.status()['reason']}")
    if torch.cuda.is_available():
        found.expect(ops.missing_cuda() is None, f"no CUDA kernels: {ops.missing_cuda()}")
    else:
        sys.path.insert(0, str(ROOT / FOLDER))
        import on_cpu

        on_cpu.kernels()


# --- tests ----------------------------------------------------------------------------------------------------


def correctness(found: Findings) -> None:
    """Compares the kernels with float64 on new problems, and the bits of every mapping and batch."""
    run_tests(
        found,
        f"{CORRECTNESS}::test_kernels_are_as_close_to_float64_as_pytorch",
        f"{CORRECTNESS}::test_bits_do_not_depend_on_mapping_batch_and_rows_in_flight",
    )


def quality(found: Findings) -> None:
    """Compares the end of a whole descent with that of float64."""
    run_tests(found, f"{CORRECTNESS}::test_all_steps_end_where_those_of_float64_do")


def tests(found: Findings) -> None:
    """Runs the op's own tests that need a GPU: streams, captured graphs, waiting, overflow."""
    if not gpu_here():
        raise Skip("torch sees no GPU")
    run_tests(found, OP_TESTS)


def sanitizer(found: Findings) -> None:
    """Runs memcheck and racecheck on a tiny case."""
    if not gpu_here():
        raise Skip("torch sees no GPU")
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        raise Skip("compute-sanitizer was not found")
    for check in ("memcheck", "racecheck"):
        child = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        child.append(f"{CORRECTNESS}::test_nine_rows_by_every_mapping")
        command = [tool, "--tool", check, "--kernel-name", "kernel_substring=defgan", "--error-exitcode", "9"]
        start = time.monotonic()
        try:
            done = subprocess.run(
                [*command, *child],
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=False,
                timeout=max(5, found.left() - 3),
            )
        except subprocess.TimeoutExpired:
            found.expect(False, f"{check} ran out of time")
            return
        found[check] = {"status": done.returncode, "seconds": round(time.monotonic() - start, 1)}
        summary = [line for line in done.stdout.splitlines() if "SUMMARY" in line]
        found[check]["summary"] = summary
        found.expect(
            done.returncode == 0 and bool(summary), f"{check}: {done.stdout[-1500:]} {done.stderr[-500:]}"
        )
        found.save()


# --- times ----------------------------------------------------------------------------------------------------


def timings(found: Findings) -> None:
    """Times whole projections; ours and peers in one process."""
    from defgan_fast.benchmark import gpu

    for failure in gpu.measure(found, found.save, found.left):
        found.expect(False, failure)


METRICS = (
    "gpu__time_duration.sum",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active",
    "lts__t_bytes.sum.per_second",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "l1tex__t_sector_hit_rate.pct",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "smsp__average_warps_issue_stalled_no_instruction_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_math_pipe_throttle_per_issue_active.ratio",
    "launch__registers_per_thread",
)


def profiled(found: Findings) -> None:
    """Makes one call by each mapping, a few steps: what ncu looks at."""
    import torch

    from defgan_fast.benchmark import gpu, peers, run
    from defgan_fast.benchmark.generators import moving_generator

    generator = moving_generator("mnist")
    for mapping in gpu.usable_mappings(generator, "float16"):
        images = 105 if mapping == "fused" else 16  # 132 groups, one for each multiprocessor of an H100
        work = run.moved(run.problem(generator, images, gpu.RESTARTS), gpu.backend())
        with gpu.forced_mapping(mapping):
            peers.ours("float16", gpu.backend()).prepare(work)(3)
    torch.cuda.synchronize()


def profile(found: Findings) -> None:
    """Runs ncu on one launch of each kernel that runs the steps."""
    if not gpu_here():
        raise Skip("torch sees no GPU")
    tool = shutil.which("ncu")
    if tool is None:
        raise Skip("ncu was not found")
    with tempfile.TemporaryDirectory() as folder:
        child = [
            sys.executable,
            str(SCRIPT),
            "--child",
            "profiled",
            "--result",
            f"{folder}/r.json",
            "--budget",
            "100",
        ]
        command = [
            tool,
            "--csv",
            "--page",
            "raw",
            "--metrics",
            ",".join(METRICS),
            "--kernel-name-base",
            "demangled",
        ]
        command += ["--kernel-name", "regex:fused_entry|team_entry", "--clock-control", "none"]
        command += ["--launch-count", "8"]
        done = subprocess.run(
            [*command, *child], capture_output=True, text=True, check=False, timeout=max(5, found.left() - 2)
        )
    lines = [line for line in done.stdout.splitlines() if line.startswith('"')]
    table = list(csv.DictReader(io.StringIO("\n".join(lines))))
    launches = [row for row in table if row.get("Kernel Name")]
    found["launches"] = [
        {key: row[key] for key in ("Kernel Name", "Grid Size", *METRICS) if row.get(key)} for row in launches
    ]
    found.expect(bool(launches), f"ncu told nothing: {done.stdout[-800:]} {done.stderr[-400:]}")
