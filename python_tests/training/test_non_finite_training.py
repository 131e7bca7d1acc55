"""A training whose numbers overflow stops with the step and the quantity, and leaves no weights that are NaN."""

import pytest
import torch

from defgan_fast import commands, data
from defgan_fast.training import loop
from defgan_fast.training.classifier import ClassifierSettings, ClassifierTrainer

WAYS = {
    "gan": ("--steps", "6", "--lr", "1e30", "--width", "2", "--critic-width", "2", "--latent-size", "4"),
    "classifier": ("--epochs", "1", "--lr", "1e30"),
    "magnet": ("--epochs", "1", "--lr", "1e30", "--width", "2"),
}


@pytest.mark.parametrize("job", WAYS)
def test_commands_stop_and_leave_no_weights(job, tmp_path, capsys):
    status = commands.main(["train", job, "--dataset", "digits", "--out", str(tmp_path), *WAYS[job]])
    last = capsys.readouterr().err.splitlines()[-1]
    assert status == 2
    assert "training stopped at step " in last
    assert "try a lower lr" in last
    assert "nan in " in last or "inf in " in last
    assert not list(tmp_path.rglob("*.safetensors"))


def make_trainer(lr=1e-3):
    images = torch.rand(40, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    dataset = data.Dataset(images, torch.arange(40) % 10, (0.0, 1.0))
    return ClassifierTrainer(ClassifierSettings(arch="A", batch=8, lr=lr), dataset, "hash")


def spoil(trainer, step, value=float("nan")):
    """Makes one weight of the second tensor unusable after a step whose metrics are still finite."""
    advance = trainer.advance

    def advance_and_spoil():
        metrics = advance()
        if trainer.step == step:
            with torch.no_grad():
                list(trainer.model.parameters())[1][0] = value
        return metrics

    trainer.advance = advance_and_spoil
    return [name for name, _ in trainer.model.named_parameters()][1]


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "nan"), (float("inf"), "inf")])
def test_the_last_good_checkpoint_stays(tmp_path, value, kind):
    trainer = make_trainer()
    name = spoil(trainer, 4, value)
    with pytest.raises(loop.NonFinite) as caught:
        loop.run(trainer, 4, tmp_path, checkpoint_every=2)
    message = str(caught.value)
    assert f"training stopped at step 4: {kind} in model.{name} (1 of " in message
    assert "the checkpoint of step 2 is kept" in message
    assert loop.load_checkpoint(tmp_path / loop.CHECKPOINT)["step"] == 2
    whole, resumed = make_trainer(), make_trainer()
    loop.run(whole, 6, tmp_path / "whole")
    loop.run(resumed, 6, tmp_path, resume=True)
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_metric_is_noticed_at_its_step(tmp_path):
    trainer = make_trainer()
    spoil(trainer, 3)
    with pytest.raises(loop.NonFinite, match=r"at step 4: nan in loss .*; there is no checkpoint yet"):
        loop.run(trainer, 9, tmp_path)


def test_a_checkpoint_with_nan_is_not_resumed(tmp_path):
    loop.run(make_trainer(), 2, tmp_path)
    path = tmp_path / loop.CHECKPOINT
    checkpoint = loop.load_checkpoint(path)
    key, weight = next(iter(checkpoint["trainer"]["model"].items()))
    weight.view(-1)[0] = float("nan")
    torch.save(checkpoint, path)
    with pytest.raises(
        ValueError, match=rf"must hold finite numbers, got nan in model.{key} \(1 of .*delete it"
    ):
        loop.run(make_trainer(), 4, tmp_path, resume=True)
