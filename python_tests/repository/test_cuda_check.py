"""The gates of `make cuda-check` catch what they are for: from recorded reports everywhere, with nvcc where it is."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

from defgan_fast.kernels import build

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "cuda_check.py"
pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="needs the checkout")

REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to x
ptxas info    : Compiling entry function '_Z5firstPf' for 'sm_90'
ptxas info    : Function properties for _Z5firstPf
    136 bytes stack frame, 24 bytes spill stores, 40 bytes spill loads
ptxas info    : Function properties for _Z5layerf
    0 bytes stack frame, 8 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 50000 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function '_Z6secondPf' for 'sm_90'
ptxas info    : Function properties for _Z6secondPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 0 barriers
"""
PTX = """
.visible .entry _Z5firstPf(
	.param .u64 .ptr .align 1 _Z5firstPf_param_0
)
.maxntid 512
.minnctapersm 1
{
}
.visible .entry _Z6secondPf(.param .u64 p)
.reqntid 16, 4, 2
{
}
.visible .entry _Z5thirdPf(.param .u64 p)
{
}
"""

CUT = """
__global__ void __launch_bounds__(32) impossible(float* data, int n) {
  if (n > 3) {
    data[threadIdx.x] = 1;
    __syncthreads();
    data[threadIdx.x + 32] = 2;
    __builtin_unreachable();
  }
  data[threadIdx.x] = 3;
}
"""
SPILLS = """
__global__ void __launch_bounds__(1024, 2) spilling(float4* data, int n) {
  float4 sum[32];
  for (int i = 0; i < 32; ++i) sum[i] = data[threadIdx.x + i * 1024];
  for (int step = 0; step < n; ++step) {
#pragma unroll
    for (int i = 0; i < 32; ++i) sum[i].x = sum[i].x * sum[(i + 1) % 32].y + sum[i].z;
  }
#pragma unroll
  for (int i = 0; i < 32; ++i) data[threadIdx.x + i * 1024] = sum[i];
}
"""
CLEAN = "__global__ void __launch_bounds__(256) doubling(float* x) { x[threadIdx.x] *= 2; }\n"
UNBOUNDED = "__global__ void doubling(float* x) { x[threadIdx.x] *= 2; }\n"
WARNS = "__global__ void __launch_bounds__(32) odd(float* x) { int unused; x[threadIdx.x] *= 2; }\n"
BROKEN = "__global__ void __launch_bounds__(32) odd(float* x) { y[0] = 1; }\n"


@pytest.fixture(scope="module")
def cuda_check():
    spec = importlib.util.spec_from_file_location("cuda_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["cuda_check"] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


def test_reports_are_read(cuda_check):
    first, layer, second = cuda_check.parse_ptxas(REPORT, "a.cu", 90)
    assert (first.kernel, first.registers, first.shared) == (True, 255, 50000)
    assert (first.stack, first.spill_stores, first.spill_loads) == (136, 24, 40)
    assert (layer.kernel, layer.registers, layer.spill_stores) == (False, None, 8)
    assert (second.kernel, second.registers, second.shared) == (True, 10, 0)
    bounds = cuda_check.launch_bounds(PTX)
    assert bounds == {"_Z5firstPf": (512, 1), "_Z6secondPf": (128, 1), "_Z5thirdPf": (None, 1)}


def test_each_gate_names_what_it_found(cuda_check):
    first, layer, second = cuda_check.parse_ptxas(REPORT, "a.cu", 90)
    first.threads, second.threads = 512, 128
    assert cuda_check.judge(first) == [
        "spills 64 bytes, allowed 0",
        "has a stack frame of 136 bytes, allowed 128",
        "uses 255 registers, 512 threads x 1 blocks a multiprocessor leave 128",
        "has 50000 bytes of static shared memory, at most 49152",
    ]
    assert cuda_check.judge(layer) == ["spills 8 bytes, allowed 0"]
    assert cuda_check.judge(second) == []
    layer.source = "fused_mnist.cu"  # some registers may be saved there
    assert cuda_check.judge(layer) == []
    second.threads, second.blocks = 1000, 2  # 1000 threads are 32 warps
    second.registers = 33
    assert cuda_check.judge(second) == [
        "uses 33 registers, 1000 threads x 2 blocks a multiprocessor leave 32"
    ]
    (serialised,) = cuda_check.warnings_in(REPORT)
    assert serialised.startswith("serialised tensor-core instructions (C7510)")


def test_paths_that_end_nowhere_are_found(cuda_check):
    declared = ".func _Z1ef\n(\n\t.param .b32 x\n)\n;\n"
    whole = ".func _Z1ef(\n\t.param .b32 x\n)\n{\n\tret;\n\n}\n"
    cut = ".visible .entry _Z1gPf(\n\t.param .u64 p\n)\n.maxntid 32\n{\n$L1:\n\tbar.sync \t0;\n$L2:\n\n}\n"
    assert cuda_check.dead_ends(declared + whole) == []
    assert cuda_check.dead_ends(declared + whole + cut) == ["_Z1gPf"]
    # A prediction alone does not end a path.
    assert cuda_check.dead_ends(cut.replace("$L2:", "@%p1 bra \t$L1;")) == ["_Z1gPf"]


def test_fused_kernels_are_for_the_architectures_that_hold_them(cuda_check):
    fused, team = Path("fused_mnist.cu"), Path("team.cu")
    assert [a for a in cuda_check.ARCHITECTURES if cuda_check.applies(fused, a)] == [90, 100]
    assert all(cuda_check.applies(team, a) for a in cuda_check.ARCHITECTURES)


@pytest.mark.skipif(build.cuda_home() is None, reason="no nvcc")
@pytest.mark.parametrize(
    ("source", "status", "said"),
    [
        (CLEAN, 0, ""),
        (SPILLS, 1, "spilling.* spills [0-9]+ bytes"),
        (UNBOUNDED, 1, "doubling.* has no launch bounds"),
        (WARNS, 1, "warning #177-D"),
        (BROKEN, 1, 'error: identifier "y" is undefined'),
        (CUT, 1, "a path of .*impossible.* ends nowhere"),
    ],
    ids=["clean", "spills", "unbounded", "warns", "broken", "cut"],
)
def test_planted_failures_are_caught(cuda_check, source, status, said, tmp_path, capfd):
    file, found = tmp_path / "planted.cu", tmp_path / "found.json"
    file.write_text(source)
    assert cuda_check.main(["--arch", "90", "--json", str(found), str(file)]) == status
    printed = capfd.readouterr()
    assert re.search(said, printed.err)
    assert bool(json.loads(found.read_text())["failures"]) == bool(status)
    if source is CLEAN:
        assert "doubling" in printed.out


def test_without_nvcc_it_says_so_and_fails(cuda_check, monkeypatch, capsys, tmp_path):
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.setenv(name, str(tmp_path))
    assert cuda_check.main([]) == 2
    assert f"no nvcc in {tmp_path}" in capsys.readouterr().err
    assert cuda_check.main(["--without-nvcc", "skip"]) == 0
