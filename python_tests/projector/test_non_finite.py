"""NaN and infinity: in weights they are refused by name; in one image, unchecked, they stay that image's own."""

import pytest
import torch
from projectors import BACKENDS, kernels, make_generator, make_projector, one_line

import defgan_fast as dg
from defgan_fast import data
from defgan_fast.kernels import extension

NAN, INF = float("nan"), float("inf")
OTHERWISE = "(with validate=False an image that is not shows it in its own errors)"


def first_name(generator):
    return next(name for name, _ in generator.named_parameters())


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("value", "kind"), [(NAN, "nan"), (INF, "inf"), (-INF, "inf")])
def test_weights_at_construction(backend, value, kind, recwarn):
    generator = make_generator()
    with torch.no_grad():
        next(generator.parameters()).view(-1)[5] = value
    with pytest.raises(ValueError) as caught:
        make_projector(generator, backend=backend)
    message = one_line(caught)
    assert (
        f"generator PaperGenerator must have finite weights, got {kind} in {first_name(generator)} (1 of "
        in message
    )
    assert not [w for w in recwarn if "does not compute" in str(w.message)]


def test_buffers_at_construction():
    generator = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Unflatten(1, (2, 2, 2))
    )
    generator[1].running_var[3] = NAN
    with pytest.raises(ValueError, match=r"got nan in 1.running_var \(1 of 8 values\)"):
        dg.Projector(generator)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_that_become_nan(images, backend):
    generator = make_generator()
    projector = make_projector(generator, backend=backend)
    projector(images)
    next(generator.parameters()).data.view(-1)[0] = NAN
    with pytest.raises(ValueError, match=rf"must have finite weights, got nan in {first_name(generator)}"):
        projector(images)
    unchecked = make_projector(make_generator(), backend=backend, validate=False)
    next(unchecked.generator.parameters()).data.fill_(NAN)
    assert not unchecked.project(images).errors.isfinite().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_overflow_are_no_fault_of_the_weights(images, backend):
    found = make_projector(backend=backend, lr=1e38).project(images)
    assert found.all_errors.shape[0] == len(images)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("value", "said"),
    [(NAN, "images must be finite"), (INF, "images must be finite"), (2.0, "range [0, 1], got [")],
)
def test_messages_name_validate(images, backend, value, said):
    images = images.clone()
    images[1, 0, 0, 0] = value
    with pytest.raises(ValueError) as caught:
        make_projector(backend=backend).project(images)
    message = one_line(caught)
    assert said in message
    assert message.endswith(OTHERWISE)


_module = extension.module()
INSTRUCTION_SETS = _module.instruction_sets() if _module else []


def check_neighbours(projector, images, exact):
    """A NaN, an infinite and a far too bright image, each in the place of every other."""
    clean = projector.project(images)
    for value in (NAN, INF, 1e4):
        for place in range(len(images)):
            spoilt = images.clone()
            spoilt[place, 0, 3, 3] = value
            found = projector.project(spoilt)
            others = [i for i in range(len(images)) if i != place]
            for name in ("images", "latents", "errors", "restarts", "all_errors"):
                kept, expected = getattr(found, name)[others], getattr(clean, name)[others]
                if exact:
                    assert torch.equal(kept, expected), f"{name}, {value} in image {place}"
                else:
                    torch.testing.assert_close(kept, expected, rtol=1e-3, atol=1e-4)
            error = found.errors[place]
            assert not error.isfinite() or error > 100 * clean.errors[place], (
                f"{value} in image {place}: {error}"
            )


@kernels
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_a_row_shows_it_and_harms_nobody(images, isa, precision, monkeypatch):
    monkeypatch.setenv("DEFGAN_CPU_ISA", isa)
    projector = make_projector(validate=False, precision=precision)
    check_neighbours(projector, images, exact=True)


def test_a_row_shows_it_on_the_reference_path(images):
    check_neighbours(make_projector(validate=False, backend="reference"), images, exact=False)


def test_foolbox_boundary_attack_goes_to_its_end():
    """Its candidates leave the range and may be NaN, which it counts on a model to answer for each by itself."""
    foolbox = pytest.importorskip("foolbox")
    classifier = dg.load_classifier("digits").eval()
    projector = dg.Projector(dg.load_generator("digits"), steps=3, restarts=1, validate=False)
    images, labels = data.load("digits", split="test")
    images, labels = images[:4], labels[:4]
    model = foolbox.PyTorchModel(
        torch.nn.Sequential(projector, classifier).eval(), bounds=(0, 1), device="cpu"
    )
    attack = foolbox.attacks.BoundaryAttack(steps=15, tensorboard=False)
    _, clipped, _ = attack(model, images, labels, epsilons=None)
    assert clipped.shape == images.shape
    spoilt = images.clone()
    spoilt[1] = NAN
    with torch.no_grad():
        logits = model(spoilt)
        assert torch.equal(logits[[0, 2, 3]].argmax(1), model(images)[[0, 2, 3]].argmax(1))
