"""The generator that a projector holds: every change of its weights is noticed, and nothing of it is changed."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from generators import PaperGenerator
from projectors import BACKENDS, K, kernels, make_generator, make_projector, same
from torch import Tensor, nn

from defgan_fast import Projector


def optimiser_step(generator: PaperGenerator, images: Tensor) -> None:
    optimiser = torch.optim.SGD(generator.parameters(), lr=0.5)
    generator(torch.ones(1, K)).sum().backward()
    optimiser.step()


def load_other_weights(generator: PaperGenerator, images: Tensor) -> None:
    generator.load_state_dict({key: value * 1.1 for key, value in generator.state_dict().items()})


def load_assigned(generator: PaperGenerator, images: Tensor) -> None:
    state = {key: value * 1.1 for key, value in generator.state_dict().items()}
    generator.load_state_dict(state, assign=True)


def write_data(generator: PaperGenerator, images: Tensor) -> None:
    generator.convolutions[4].weight.data[0, 0, 2, 2] += 0.5


def swap_data(generator: PaperGenerator, images: Tensor) -> None:
    generator.linear.weight.data = generator.linear.weight.data * 1.1


def write_numpy(generator: PaperGenerator, images: Tensor) -> None:
    generator.linear.bias.detach().numpy()[3] += 0.5


def write_in_inference_mode(generator: PaperGenerator, images: Tensor) -> None:
    with torch.inference_mode():
        generator.linear.bias.add_(0.1)


def replace_layer(generator: PaperGenerator, images: Tensor) -> None:
    generator.linear = nn.Linear(K, generator.linear.out_features)


def smallest_change(generator: PaperGenerator, images: Tensor) -> None:
    """One bit, of the largest weight of the last layer."""
    weight = generator.convolutions[4].weight.data.flatten()
    i = weight.abs().argmax()
    weight[i] = torch.nextafter(weight[i], torch.tensor(9.0))


CHANGES = [
    optimiser_step,
    load_other_weights,
    load_assigned,
    write_data,
    swap_data,
    write_numpy,
    write_in_inference_mode,
    replace_layer,
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_noticed(images: Tensor, backend: str, change: Callable) -> None:
    generator = make_generator()
    projector = make_projector(generator, backend=backend)
    original = copy.deepcopy(generator)
    before = projector.project(images)
    change(generator, images)
    after = projector.project(images)
    assert not torch.equal(before.images, after.images)
    assert same(after, make_projector(copy.deepcopy(generator), backend=backend).project(images))
    generator.load_state_dict(original.state_dict())
    assert same(projector.project(images), before)


@kernels
def test_a_change_anywhere_is_noticed() -> None:
    """Also far into a large parameter, which several threads share the reading of."""
    generator = nn.Sequential(
        nn.Linear(K, 25_000), nn.LeakyReLU(0.2), nn.Linear(25_000, 64), nn.Unflatten(1, (1, 8, 8))
    )
    generator.latent_size = K
    projector = Projector(generator, steps=1, restarts=1, backend="cpu")
    images = torch.rand(1, 1, 8, 8)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            weight = generator[2].weight.data.view(-1)
            for place in (0, weight.numel() // 2, weight.numel() - 1):
                errors = projector.project(images).errors
                weight[place] += 1e3
                changed = projector.project(images).errors
                weight[place] -= 1e3
                assert not torch.equal(changed, errors)
    finally:
        torch.set_num_threads(before)


@kernels
def test_the_smallest_change_is_noticed(images: Tensor) -> None:
    """Of one bit of one weight: seen in the latents of many steps, and exactly as by a projector built afterwards."""
    generator = make_generator()
    projector = make_projector(generator, steps=20)
    before = projector.project(images)
    smallest_change(generator, images)
    after = projector.project(images)
    assert not torch.equal(before.latents, after.latents)
    assert same(after, make_projector(copy.deepcopy(generator), steps=20).project(images))


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_of_batch_norm_are_weights_too(backend: str) -> None:
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(K, 12), nn.BatchNorm1d(12), nn.Unflatten(1, (1, 3, 4)))
    projector = make_projector(generator, backend=backend)
    x = torch.rand(2, 1, 3, 4)
    before = projector(x)
    generator[1].running_mean.data[2] += 1
    assert not torch.equal(projector(x), before)


class Recording(nn.Module):
    """Says in which mode it is run; nothing can lower it."""

    latent_size = K

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.seen = nn.Linear(K, 12), nn.BatchNorm1d(12), set()

    def forward(self, z: Tensor) -> Tensor:
        self.seen.add((self.training, self.norm.training))
        return nn.functional.softplus(self.norm(self.linear(z))).view(-1, 1, 3, 4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_generator_stays_in_eval_mode(backend: str) -> None:
    torch.manual_seed(0)
    generator = nn.Sequential(
        nn.Linear(K, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.5), nn.Unflatten(1, (1, 3, 4))
    ).train()
    projector = make_projector(generator, backend=backend)
    assert not any(m.training for m in generator.modules())
    x = torch.rand(3, 1, 3, 4)
    state = copy.deepcopy(generator.state_dict())
    expected = projector(x)

    def whole_model(model: nn.Module) -> None:
        model.train()

    def generator_itself(model: nn.Module) -> None:
        generator.train()

    def batch_norms(model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.train()

    def dropouts(model: nn.Module) -> None:
        generator[3].train()

    model = nn.Sequential(projector, nn.Flatten(), nn.Linear(12, 2))
    for disturb in (whole_model, generator_itself, batch_norms, dropouts):
        disturb(model)
        assert torch.equal(projector(x), expected), disturb.__name__
        assert not any(m.training for m in generator.modules()), disturb.__name__
        assert all(torch.equal(state[key], value) for key, value in generator.state_dict().items())
    model.train()
    assert projector.training, "the projector itself obeys"
    assert not generator.training
    assert projector.train() is projector
    assert not projector.eval().training


def test_a_generator_without_a_plan_runs_in_eval_mode() -> None:
    generator = Recording()
    projector = make_projector(generator, backend="reference")
    generator.seen.clear()
    state = copy.deepcopy(generator.state_dict())
    projector.train()
    generator.norm.train()
    projector(torch.rand(2, 1, 3, 4))
    assert generator.seen == {(False, False)}
    assert all(torch.equal(state[key], value) for key, value in generator.state_dict().items())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gradient", ["straight_through", "unrolled"])
def test_parameters_and_their_gradients_are_untouched(images: Tensor, backend: str, gradient: str) -> None:
    generator = make_generator()
    projector = make_projector(generator, backend=backend, gradient=gradient)
    state = copy.deepcopy(generator.state_dict())
    for i, parameter in enumerate(generator.parameters()):
        parameter.grad = torch.full_like(parameter, 7.0) if i % 2 else None
    x = images.clone().requires_grad_()
    projector(x).square().sum().backward()
    assert x.grad.abs().sum() > 0
    for i, parameter in enumerate(generator.parameters()):
        assert (parameter.grad == 7).all() if i % 2 else parameter.grad is None
        assert parameter.requires_grad
    assert all(torch.equal(state[key], value) for key, value in generator.state_dict().items())


def test_the_generator_is_held_and_not_copied() -> None:
    generator = make_generator()
    projector = make_projector(generator)
    assert projector.generator is generator
    assert [id(p) for p in projector.parameters()] == [id(p) for p in generator.parameters()]
    assert next(projector.parameters()).device.type == "cpu"
