"""The settings that are found against an exhaustive grid, on generators that need rates far apart."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from projectors import K, make_generator, one_line
from torch import Tensor, nn

from defgan_fast import Projector, commands, data, load_generator, tuning
from defgan_fast.tuning import Trial

SMALL = 40_000


class Scaled(nn.Module):
    """The generator of a latent that is stretched: its best rate is that of the other one over scale^2."""

    latent_size = K

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.inner = make_generator()
        with torch.no_grad():
            self.inner.linear.weight.mul_(scale)

    def forward(self, z: Tensor) -> Tensor:
        return self.inner(z)


def within_range(generator: nn.Module, count: int = 6) -> Tensor:
    """Returns images that the generator nearly makes."""
    rng = torch.Generator().manual_seed(7)
    with torch.no_grad():
        images = generator(torch.randn(count, K, generator=rng))
    return (images + 0.05 * torch.randn(images.shape, generator=rng)).clamp(0, 1)


def error_of(generator: nn.Module, images: Tensor, **settings) -> float:
    """Returns the error that settings lead to, infinite where it is not finite."""
    error = Projector(generator, **settings).project(images).errors.mean().item()
    return error if math.isfinite(error) else math.inf


def test_a_tuned_projector_is_as_good_as_the_best_of_an_exhaustive_grid() -> None:
    rates = []
    for scale in (0.2, 1.0):
        generator = Scaled(scale)
        images = within_range(generator)
        settings = Projector.tune(generator, images, budget=SMALL, verbose=False)
        rates.append(settings["lr"])
        best = min(
            error_of(generator, images, lr=rate, restarts=4, steps=50, **beginning)
            for rate in tuning.RATES
            for beginning in tuning.BEGINNINGS
        )
        assert error_of(generator, images, **settings) <= 1.15 * best
        cost = settings["restarts"] * settings["steps"]
        assert cost <= 200, "more than the grid's cost is of no use on these images"
        slow = settings | {"lr": settings["lr"] / 100}
        assert error_of(generator, images, **slow) > 1.3 * best, "the images do not tell rates apart"
    assert rates[0] > rates[1], "the flatter generator needs the larger rate"


@pytest.mark.slow
def test_the_digits_against_an_exhaustive_grid() -> None:
    generator, images = load_generator("digits"), data.load("digits", split="validation").first(40).images
    settings = Projector.tune(generator, images, budget=SMALL, verbose=False)
    best = min(
        error_of(generator, images[::5], lr=rate, restarts=4, steps=50, **beginning)
        for rate in (3.0, 10.0, 30.0, 100.0)
        for beginning in tuning.BEGINNINGS
    )
    assert error_of(generator, images[::5], **settings) <= 1.15 * best


def test_the_cheapest_of_the_nearly_best_is_chosen() -> None:
    def trial(restarts: int, steps: int, error: float, lr: float = 10.0) -> Trial:
        return Trial({"lr": lr}, restarts, steps, error)

    trials = [trial(10, 200, 1.0), trial(2, 50, 1.09), trial(2, 50, 1.05, 3.0), trial(1, 50, 1.11)]
    assert tuning.chosen(trials, 1.0) == trials[2]
    assert tuning.chosen(trials[:1], 1.0) == trials[0]
    assert tuning.chosen([*trials, trial(1, 10, 2.0)], 1e5).row_steps == 10, "errors that are none are alike"
    table = tuning.table(trials, trials[2])
    assert [line.split()[0] for line in table.splitlines()[1:]] == ["50", "100", "2000"]
    assert [line.endswith("chosen") for line in table.splitlines()[1:]] == [False, True, False]


def test_it_says_what_it_does_and_keeps_to_its_budget(capfd: pytest.CaptureFixture) -> None:
    generator, used = make_generator(), []

    class Counted(Projector):
        def project(self, images: Tensor, *arguments, **named):
            used.append(len(images) * self.restarts * self.steps)
            return super().project(images, *arguments, **named)

    images = within_range(generator, 30)
    settings = Counted.tune(generator, images, budget=SMALL, gradient="none", seed=3)
    assert 0.5 * SMALL < sum(used) < 1.3 * SMALL
    assert settings["gradient"] == "none"
    assert settings["seed"] == 3
    captured = capfd.readouterr()
    assert "<- chosen" in captured.err
    assert captured.out == ""
    assert Projector.tune(generator, images, budget=SMALL, gradient="none", seed=3, verbose=False) == settings
    assert capfd.readouterr().err == ""


def test_wrong_images() -> None:
    generator = make_generator()
    for images, got in (
        (torch.rand(28, 28), r"\[28, 28\]"),
        (torch.rand(0, 1, 28, 28), r"\[0, "),
        (3, "int"),
    ):
        with pytest.raises(ValueError, match=rf"^images must have shape \[N, C, H, W\].*{got}") as caught:
            Projector.tune(generator, images)
        one_line(caught)
    with pytest.raises(ValueError, match=r"^budget must be at least 1, got 0"):
        Projector.tune(generator, torch.rand(2, 1, 28, 28), budget=0)


class Overflows:
    """Stands for a projector whose errors are not finite."""

    def project(self, images: Tensor) -> SimpleNamespace:
        return SimpleNamespace(all_errors=torch.full((len(images), 4), math.nan))


def test_no_finite_error_is_an_error_of_one_line() -> None:
    arguments = {"budget": 1, "seed": 0, "verbose": False, "fixed": {}}
    with pytest.raises(
        ValueError, match=r"^generator gives no finite error at any rate from 0.3 to"
    ) as caught:
        tuning.tune(lambda *_, **settings: Overflows(), nn.Identity(), torch.rand(2, 1, 4, 4), **arguments)
    one_line(caught)


def test_the_fast_settings_and_what_comes_before_them() -> None:
    projector = Projector.fast(make_generator(), restarts=3)
    assert (projector.starts, projector.radius, projector.restarts) == ("nearest", "auto", 3)
    assert Projector.fast(make_generator()).restarts * Projector.fast(make_generator()).steps <= 50
    assert projector(torch.rand(2, 1, 28, 28)).shape == (2, 1, 28, 28)


FACTORY = """
from torch import nn

def make():
    return nn.Sequential(nn.Linear(4, 9), nn.Sigmoid(), nn.Unflatten(1, (1, 3, 3)))

def wrong():
    return 5
"""


def test_the_command(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_factory.py").write_text(FACTORY)
    np.save(tmp_path / "clean.npy", np.random.default_rng(0).random((3, 1, 3, 3)))
    words = ["tune", "--generator", "own_factory:make", "--images", "clean.npy", "--budget", "10"]
    assert commands.main([*words, "--seed", "2"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("Projector(generator, lr=")
    assert "seed=2" in captured.out
    from own_factory import make

    eval(captured.out, {"Projector": Projector, "generator": make()})(torch.rand(1, 1, 3, 3))
    for wrong, message in (
        (["tune", "--generator", "own_factory:make"], "--images or --dataset must be given"),
        (["tune"], "--generator or --dataset must be given"),
        (
            [*words[:2], "own_factory:wrong", *words[3:]],
            "--generator must make a torch.nn.Module, got int from own_factory:wrong",
        ),
        (
            [*words[:2], "own_factory:none", *words[3:]],
            r"--generator must be module:factory, got own_factory:none",
        ),
        ([*words[:4], "other.npy"], "no such file: other.npy"),
        (
            [*words[:4], "own_factory.py"],
            "own_factory.py must be a folder or end in .npy, .npz, .pt, .safetensors",
        ),
    ):
        assert commands.main(wrong) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
