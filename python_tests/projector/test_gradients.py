"""The gradient that each value of `gradient=` promises, on both paths."""

from __future__ import annotations

import copy

import pytest
import torch
from projectors import BACKENDS, K, kernels, make_projector, one_line, same
from torch import Tensor, nn

from defgan_fast import Projection, gradients, reference
from defgan_fast.starts import starting_points


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_straight_through_is_the_identity(images: Tensor, backend: str, dtype: torch.dtype) -> None:
    projector = make_projector(backend=backend)
    x = images.to(dtype).detach().clone().requires_grad_()
    weight = torch.randn(x.shape).to(dtype)
    out = projector(x)
    assert torch.equal(out, projector(x.detach())), "the gradient must not change the reconstruction's bits"
    (out * weight).sum().backward()
    assert torch.equal(x.grad, weight)
    # Through a graph, and twice: BPDA composes with whatever comes before and after.
    x.grad = None
    inner = x * 0.5
    projector(inner + 0.25).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 0.5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_straight_through_differentiates_twice(images: Tensor, backend: str) -> None:
    projector = make_projector(backend=backend)
    x = images.clone().requires_grad_()
    out = projector(x)
    (first,) = torch.autograd.grad(out.pow(3).sum(), x, create_graph=True)
    torch.testing.assert_close(first, 3 * out.detach().square())
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, 6 * out.detach())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gradient", ["straight_through", "unrolled", "none"])
def test_only_the_image_carries_the_gradient(images: Tensor, backend: str, gradient: str) -> None:
    projector = make_projector(backend=backend, gradient=gradient)
    x = images.clone().requires_grad_()
    p = projector.project(x)
    assert p.images.requires_grad
    assert p.images.grad_fn is not None
    for field in (p.latents, p.errors, p.restarts, p.all_errors):
        assert not field.requires_grad
    assert same(
        Projection(*(field if field is None else field.detach() for field in p)), projector.project(images)
    )
    for quiet in (
        projector.project(images),
        projector.project(images, z0=torch.randn(3, K, requires_grad=True)),
    ):
        assert not any(field is not None and field.requires_grad for field in quiet)
    with torch.no_grad():
        assert not projector(x).requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_none_raises_on_backward(images: Tensor, backend: str) -> None:
    projector = make_projector(backend=backend, gradient="none")
    x = images.clone().requires_grad_()
    out = nn.Sequential(projector, nn.Flatten())(x)
    with pytest.raises(RuntimeError, match=r"none.*straight_through.*unrolled") as caught:
        out.sum().backward()
    one_line(caught)
    assert x.grad is None
    assert torch.equal(projector(images), make_projector(backend=backend)(images))


class Smooth(nn.Module):
    """Small, float64 and without kinks; `hidden` keeps torch.fx from tracing it."""

    latent_size = 3

    def __init__(self, lowerable: bool) -> None:
        super().__init__()
        self.first, self.second, self.lowerable = nn.Linear(3, 6), nn.ConvTranspose2d(6, 1, 2), lowerable
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(0, 0.8)

    def forward(self, z: Tensor) -> Tensor:
        h = torch.tanh(self.first(z)).view(-1, 6, 1, 1)
        if not self.lowerable and not torch.isfinite(h).all():
            return h
        return torch.sigmoid(self.second(h))


@pytest.mark.filterwarnings("ignore:running on the reference path")
@pytest.mark.parametrize("lowerable", [True, False])
@pytest.mark.parametrize("restarts", [1, 3])
def test_unrolled_passes_gradcheck(lowerable: bool, restarts: int) -> None:
    """Through 3 steps, the last of them at the reduced rate, with the starting points of several restarts."""
    torch.manual_seed(restarts)
    generator = Smooth(lowerable).double()
    projector = make_projector(
        generator, steps=3, restarts=restarts, lr=2.0, decay_at=0.5, gradient="unrolled"
    )
    x = torch.rand(2, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(projector, (x,), eps=1e-6, atol=1e-8)
    # It is not the identity, nor nothing, and each image's gradient is its own.
    (gradient,) = torch.autograd.grad(projector(x)[0].sum(), x)
    assert gradient[0].abs().max() > 1e-3
    assert not torch.allclose(gradient[0], torch.ones_like(gradient[0]), atol=1e-2)
    assert (gradient[1] == 0).all()


@kernels
@pytest.mark.parametrize("radius", [0.0, 1.3])
@pytest.mark.parametrize("keep", [(), ((0, 3), (1, 2), (2, 1))], ids=["all", "dropped"])
def test_unrolled_op_passes_gradcheck(radius: float, keep: reference.Keep) -> None:
    """The op that the kernel path uses, in float64 through a plan's text, for every restart in turn."""
    from defgan_fast.plan import lower

    torch.manual_seed(1)
    generator = Smooth(True).double()
    plan = lower(generator, 3)
    parameters = [p.detach() for p in plan.tensors(generator)]
    z0, rates = torch.randn(2, 4, 3, dtype=torch.float64), [2.0, 1.5, 0.2]
    taken = set()

    def reconstruct(x: Tensor, restart: int) -> Tensor:
        latents, _, steps = reference.project_keeping(generator, x, z0, rates, 0.7, keep, None, radius)
        taken.update(steps[:, restart].tolist())
        with torch.no_grad():
            reconstruction = generator(latents[:, restart])
        start, own = z0[:, restart], steps[:, restart] if keep else None
        return gradients.unrolled(x, reconstruction, start, parameters, plan.text, rates, 0.7, radius, own)

    for restart in range(4):
        x = torch.rand(2, 1, 2, 2, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(
            lambda y, restart=restart: reconstruct(y, restart),
            (x,),
            eps=1e-6,
            atol=1e-8,
            check_forward_ad=True,
        )
    assert taken == ({0, 1, 2, 3} if keep else {3})


@pytest.mark.parametrize("backend", BACKENDS)
def test_unrolled_in_float32_is_the_one_of_float64(backend: str) -> None:
    torch.manual_seed(4)
    generator = Smooth(True)
    x = torch.rand(5, 1, 2, 2)
    weight = torch.randn(5, 1, 2, 2)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        twin = copy.deepcopy(generator).to(dtype)
        projector = make_projector(twin, steps=6, lr=2.0, gradient="unrolled", backend=backend, max_rows=2)
        y = x.to(dtype, copy=True).requires_grad_()
        (projector(y) * weight.to(dtype)).sum().backward()
        gradients.append(y.grad.double())
    assert gradients[1].abs().max() > 0.01
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_unrolled_follows_the_chosen_restart_of_each_image(images: Tensor, backend: str) -> None:
    """Against a projector that is given each image's best starting point alone; per image and for [B, R, k]."""
    projector = make_projector(backend=backend, gradient="unrolled")
    for z0 in (starting_points(0, 3, K), torch.randn(4, 3, K)):
        x = images.clone().requires_grad_()
        p = projector.project(x, z0=z0)
        assert len(set(p.restarts.tolist())) > 1, "the case cannot tell restarts apart"
        (got,) = torch.autograd.grad(p.images.square().sum(), x)
        for i in range(4):
            one = images[i : i + 1].clone().requires_grad_()
            start = z0[p.restarts[i]] if z0.dim() == 2 else z0[i, p.restarts[i]]
            (expected,) = torch.autograd.grad(
                projector.project(one, z0=start[None]).images.square().sum(), one
            )
            torch.testing.assert_close(got[i : i + 1], expected, rtol=1e-3, atol=1e-5)
            assert expected.abs().max() > 1e-3


@pytest.mark.parametrize("gradient", ["straight_through", "unrolled"])
def test_a_projector_built_in_inference_mode_differentiates(images: Tensor, gradient: str) -> None:
    with torch.inference_mode():
        projector = make_projector(gradient=gradient)
    x = images.clone().requires_grad_()
    projector(x).sum().backward()
    assert x.grad.abs().sum() > 0
