"""The device primitives under nvcc: no warning on any architecture, and the instructions that they stand for."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "csrc" / "tests" / "device_primitives.cu"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
ARCHITECTURES = (80, 86, 89, 90, 100, 120)

pytestmark = pytest.mark.skipif(NVCC is None, reason="needs nvcc")


def compile_to(target: Path, *options: str) -> str:
    command = [str(NVCC), "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Werror", "all-warnings"]
    done = subprocess.run(
        [*command, *options, "-o", str(target), str(SOURCE)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_no_warning_on_any_architecture(tmp_path: Path) -> None:
    codes = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in ARCHITECTURES]
    messages = compile_to(tmp_path / "primitives.fatbin", "-fatbin", "-Xptxas", "-v,-warn-spills", *codes)
    assert "warning" not in messages.lower()
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", messages)]
    assert len(spills) >= 2 * 2 * len(ARCHITECTURES)
    assert not any(spills)


def test_accesses_name_their_memory(tmp_path: Path) -> None:
    compile_to(tmp_path / "primitives.ptx", "-ptx", "-arch=compute_80")
    ptx = (tmp_path / "primitives.ptx").read_text()
    # A load or store without a state space is a generic one: slower, and a pointer's check at run time.
    generic = re.findall(
        r"^\s*(?:ld|st)\.(?!param|shared|global|local|const|acquire|volatile)\S+.*", ptx, re.MULTILINE
    )
    assert not generic
    # Sixteen bytes are one instruction, not sixteen.
    assert len(re.findall(r"ld\.shared\.u8", ptx)) == 2
    for instruction in (
        "ld.global.nc.v4.u32",  # load_constant: the read-only path
        "ld.global.v4.u32",  # load_global: through L1, which the team's barrier empties
        "st.global.cg.v4.u32",
        "ld.shared.v4.u32",
        "st.shared.v4.u32",
        "ld.shared.u32",
        "shfl.sync.idx.b32",
        "cp.async.cg.shared.global",
        "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16",
        "movmatrix.sync.aligned.m8n8.trans.b16",
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
        "cvt.rn.f16x2.f32",
        "cvt.rn.bf16x2.f32",
        "atom.add.acq_rel.gpu.global.u32",
        "ld.acquire.gpu.global.u32",
    ):
        assert instruction in ptx, instruction
