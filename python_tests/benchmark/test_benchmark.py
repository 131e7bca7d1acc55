"""The benchmark: useful work is counted right, wrong results are never timed, and the arithmetic adds up."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from defgan_fast import commands
from defgan_fast.benchmark import flops, generators, peers, report, run
from defgan_fast.benchmark.load import OtherLoad
from defgan_fast.kernels import extension
from defgan_fast.plan import lower

needs_kernels = pytest.mark.skipif(not extension.load(), reason="the extension is not built")


def test_mnist_step_is_70_mflop():
    generator = generators.moving_generator("mnist")
    assert flops.flop_per_step(generator, 128) == pytest.approx(70.4e6, rel=1e-3)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "output_padding"),
    [(5, 2, 2, 1), (4, 2, 1, 0), (3, 1, 0, 0), (2, 3, 0, 1)],
)
def test_transposed_convolution_counts_what_a_convolution_of_ones_counts(
    kernel, stride, padding, output_padding
):
    layer = nn.ConvTranspose2d(3, 5, kernel, stride, padding, output_padding)
    ones = F.conv_transpose2d(
        torch.ones(1, 1, 4, 6), torch.ones(1, 1, kernel, kernel), None, stride, padding, output_padding
    )
    generator = nn.Sequential(nn.Unflatten(1, (3, 4, 6)), layer)
    assert flops.multiply_adds(generator, 3 * 4 * 6) == 3 * 5 * int(ones.sum())


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (5, 2, 0), (4, 3, 2)])
def test_convolution_counts_what_a_convolution_of_ones_counts(kernel, stride, padding):
    layer = nn.Conv2d(3, 5, kernel, stride, padding)
    ones = F.conv2d(torch.ones(1, 1, 7, 9), torch.ones(1, 1, kernel, kernel), None, stride, padding)
    generator = nn.Sequential(nn.Unflatten(1, (3, 7, 9)), layer)
    assert flops.multiply_adds(generator, 3 * 7 * 9) == 3 * 5 * int(ones.sum())


def test_upsampling_counts_the_small_input():
    # 4 outputs of one row of 2 inputs upsampled to 4, 3 taps padded by 1: the taps of output 0 are (pad, 0,
    # 0), of 1 (0, 0, 1), of 2 (0, 1, 1) and of 3 (1, 1, pad): 1 + 2 + 2 + 1 pairs on either axis.
    generator = nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Upsample(scale_factor=2), nn.Conv2d(1, 1, 3, padding=1)
    )
    assert flops.multiply_adds(generator, 4) == 6 * 6


@needs_kernels
@pytest.mark.parametrize("name", generators.GENERATORS)
def test_kernels_count_the_same_work(name):
    generator = generators.moving_generator(name)
    k = generators.latent_size(generator)
    plan = lower(generator, k).text
    assert extension.module().flop_per_step(plan) == flops.flop_per_step(generator, k)


@pytest.mark.parametrize("name", generators.GENERATORS)
def test_generators_move(name):
    generator = generators.moving_generator(name)
    run.expected_errors(run.problem(generator, 2, 2))  # raises where the loss falls by less than a third


def test_generators_are_seeded():
    first, second = generators.moving_generator("digits"), generators.moving_generator("digits")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    other = generators.moving_generator("digits", seed=1)
    assert not torch.equal(next(first.parameters()), next(other.parameters()))


def test_unknown_generator_is_named():
    with pytest.raises(ValueError, match=r"generator must be one of mnist, .*, got 'nonesuch'"):
        generators.moving_generator("nonesuch")


@pytest.fixture(scope="module")
def work():
    return run.problem(generators.moving_generator("digits"), 3, 2)


@pytest.mark.parametrize("peer", peers.pytorch_peers(compiled=False), ids=lambda p: f"{p.name}-{p.precision}")
def test_peers_agree_with_the_reference(peer, work):
    run.check(peer, peer.prepare(work), run.expected_errors(work))


@pytest.mark.slow
def test_compiled_peer_agrees_with_the_reference(work):
    torch.compiler.reset()
    compiled = [peer for peer in peers.pytorch_peers() if peer.name == "torch.compile NCHW"]
    if not compiled:
        pytest.skip("no C++ compiler")
    run.check(compiled[0], compiled[0].prepare(work), run.expected_errors(work))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@needs_kernels
def test_kernels_agree_with_the_reference(precision, work):
    peer = peers.ours(precision)
    run.check(peer, peer.prepare(work), run.expected_errors(work))


@pytest.mark.parametrize("name", ["mnist", "digits", "celeba"])
def test_jax_agrees_with_the_reference(name):
    pytest.importorskip("jax", reason="JAX, an optional peer, is not installed")
    problem = run.problem(generators.moving_generator(name), 2, 2)
    (peer,) = peers.jax_peers()
    run.check(peer, peer.prepare(problem), run.expected_errors(problem))
    with pytest.raises(peers.Unavailable, match="no JAX translation of Upsample"):
        peer.prepare(run.problem(generators.moving_generator("upsampling"), 1, 1))


@pytest.mark.parametrize(("fewer", "precision"), [(5, "float32"), (1, "float32"), (5, "bfloat16")])
def test_a_backend_that_skips_steps_is_never_timed(fewer, precision, work):
    eager = peers.pytorch_peers(compiled=False)[0]
    lazy = eager.prepare(work)
    peer = peers.Peer("lazy", precision, lambda work: lambda steps: lazy(steps - fewer))
    with pytest.raises(RuntimeError, match=r"lazy .* is not correct and was not timed"):
        run.check(peer, peer.prepare(work), run.expected_errors(work))


def test_a_problem_that_does_not_move_is_refused():
    generator = generators.moving_generator("digits")
    with torch.no_grad():
        next(generator.parameters()).mul_(1e-4)  # the gradient with respect to z all but vanishes
    with pytest.raises(RuntimeError, match="does not move"):
        run.expected_errors(run.problem(generator, 2, 2))


@pytest.fixture(scope="module")
def measurement():
    cases = [run.Case(1, 2, "float32"), run.Case(2, 1, "bfloat16")]
    return run.measure(cases, generator_name="digits", repetitions=3, seconds=0.01, steps=10, compiled=False)


def test_an_interrupted_measurement_is_continued(measurement):
    first = run.Case(1, 2, "float32")
    earlier = json.loads(json.dumps(measurement)) | {"complete": False}
    earlier["rows"] = [row for row in earlier["rows"] if row["precision"] == "float32"]
    kept = [row["ms_per_step"] for row in earlier["rows"]]
    saved = []
    result = run.measure(
        [first, run.Case(2, 1, "bfloat16")],
        generator_name="digits",
        repetitions=1,
        seconds=0.01,
        steps=10,
        compiled=False,
        earlier=earlier,
        save=lambda result: saved.append((len(result["rows"]), result["complete"])),
    )
    assert [row["ms_per_step"] for row in result["rows"][: len(kept)]] == kept
    assert {row["precision"] for row in result["rows"][len(kept) :]} == {"bfloat16"}
    assert saved == [(len(result["rows"]), False), (len(result["rows"]), True)]
    assert result["complete"]


def test_other_conditions_are_not_continued(measurement):
    other = measurement | {"generator": "mnist", "complete": False}
    with pytest.raises(ValueError, match="the earlier measurement has generator mnist, this one digits"):
        run.measure([], generator_name="digits", earlier=other)


@pytest.mark.parametrize(("complete", "continued"), [(False, True), (True, False)])
def test_only_an_unfinished_file_is_continued(
    complete, continued, measurement, tmp_path, monkeypatch, capsys
):
    file = tmp_path / "bench.json"
    file.write_text(json.dumps(measurement | {"complete": complete}))
    given = []

    def measure(cases, earlier, save, **_):
        given.append((cases, earlier))
        save(measurement)
        return measurement

    monkeypatch.setattr(run, "measure", measure)
    assert commands.main(["bench", "--precision", "float32", "--json", str(file)]) == 0
    assert [case.precision for case in given[0][0]] == ["float32"] * len(run.SIZES)
    assert (given[0][1] is not None) == continued
    assert json.loads(file.read_text())["complete"]
    assert list(tmp_path.iterdir()) == [file]


def test_rows_have_the_promised_keys(measurement):
    keys = "backend precision images restarts steps threads ms_per_step gflops_useful share_of_peak"
    for row in measurement["rows"]:
        assert {*keys.split(), "ratio_to_best_peer"} <= row.keys()
    assert {row["precision"] for row in measurement["rows"]} == {"float32", "bfloat16"}
    json.dumps(measurement)


def test_numbers_of_a_row_agree_with_each_other(measurement):
    flop = measurement["flop_per_row_and_step"]
    for row in measurement["rows"]:
        rows = row["images"] * row["restarts"]
        gflops = flop * rows / (row["ms_per_step"] * 1e6)
        assert row["gflops_useful"] == pytest.approx(gflops)
        low, high = row["ms_per_step_range"]
        assert low <= row["ms_per_step"] <= high
        peak = measurement["limits"][row["precision"]]["probe"]
        if peak is not None:
            assert row["share_of_peak"] == pytest.approx(gflops / peak)


def test_ratio_is_to_the_fastest_peer_of_the_case(measurement):
    for precision in ("float32", "bfloat16"):
        rows = [row for row in measurement["rows"] if row["precision"] == precision]
        best = min(row["ms_per_step"] for row in rows if not row["backend"].startswith("defgan_fast"))
        for row in rows:
            assert row["ratio_to_best_peer"] == pytest.approx(best / row["ms_per_step"])


def test_report_shows_every_row_and_draws(measurement, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    file = tmp_path / "bench.json"
    file.write_text(json.dumps(measurement))
    assert report.main([str(file)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n| 1 x 2 | float32 |") + printed.count("\n| 2 x 1 | bfloat16 |") == len(
        measurement["rows"]
    )
    assert measurement["environment"]["versions"]["torch"] in printed
    assert (tmp_path / "bench.png").stat().st_size > 5000


def test_report_of_a_missing_file(tmp_path, capsys):
    assert report.main([str(tmp_path / "none.json")]) == 2
    assert capsys.readouterr().err == f"no such file: {tmp_path / 'none.json'}\n"


def test_disturbance_is_told(measurement):
    quiet = measurement | {"other_load": 0.02}
    assert run.disturbance(quiet) is None
    assert "1.3 cores" in (run.disturbance(measurement | {"other_load": 1.3}) or "")


def test_other_load_sees_another_process():
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        with OtherLoad() as load:
            time.sleep(1.0)
    finally:
        busy.kill()
        busy.wait()
    if load.cores is None:
        pytest.skip("this system does not tell")
    assert load.cores > 0.2


def test_other_load_leaves_out_this_process():
    with OtherLoad() as idle:
        time.sleep(0.5)
    with OtherLoad() as working:
        end = time.perf_counter() + 0.5
        while time.perf_counter() < end:
            pass
    if idle.cores is None or working.cores is None:
        pytest.skip("this system does not tell")
    if idle.cores > 0.1:
        pytest.skip("the machine is not quiet")
    assert working.cores < 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--generator", "nonesuch"], "generator must be one of"),
        (["--threads", "0"], "threads must be at least 1, got 0"),
        (["--json", "/nonexistent/file.json"], "No such file or directory"),
    ],
)
def test_wrong_use_is_one_line(arguments, message, capsys):
    assert commands.main(["bench", "--quick", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {(size, precision) for size in run.SIZES for precision in ("float32", "bfloat16")}),
        (["--precision", "bfloat16"], {(size, "bfloat16") for size in run.SIZES}),
        (["--quick"], {((1, 10), "float32"), ((10, 10), "float32")}),
        (["--quick", "--precision", "bfloat16"], {((1, 10), "bfloat16"), ((10, 10), "bfloat16")}),
    ],
)
def test_options_choose_the_cases(arguments, expected, monkeypatch):
    """No combination may measure nothing."""

    class Measured(Exception):
        pass

    def measure(cases, **_):
        raise Measured(cases)

    monkeypatch.setattr(run, "measure", measure)
    with pytest.raises(Measured) as called:
        commands.main(["bench", *arguments])
    (cases,) = called.value.args
    assert {((case.images, case.restarts), case.precision) for case in cases} == expected


WHOLE_TEST_SETS = Path(__file__).resolve().parents[2] / "bench" / "whole_test_sets.py"


@pytest.mark.skipif(not WHOLE_TEST_SETS.is_file(), reason="needs the checkout")
def test_whole_test_sets_are_measured_clean_and_attacked(tmp_path):
    file = tmp_path / "new" / "result.json"
    command = [
        sys.executable,
        str(WHOLE_TEST_SETS),
        "--dataset",
        "digits",
        "--images",
        "20",
        "--steps",
        "1",
        "40",
    ]
    done = subprocess.run(
        [*command, "--device", "cpu", "--json", str(file)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    alone, *rows = json.loads(file.read_text())["rows"]
    assert [json.loads(line) for line in done.stdout.splitlines()] == [alone, *rows]
    assert [(row["steps"], row["images_are"]) for row in rows] == [
        (1, "clean"),
        (1, "fgsm"),
        (40, "clean"),
        (40, "fgsm"),
    ]
    assert alone["classifier_clean"] > 0.9 > 0.5 > alone["classifier_attacked"]
    first, _, clean, attacked = rows
    assert clean["mean_error"] < first["mean_error"]
    assert clean["accuracy"] > 0.9
    assert attacked["accuracy"] > alone["classifier_attacked"]
