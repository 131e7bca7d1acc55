"""No way of differentiating loses the gradient that `gradient=` promises: it is given, or an error is raised.

Every way is applied to a module that returns half of its images and half of their projections: 1 is the derivative
under the identity, and 0.5 would be that of a tie that was lost.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from projectors import BACKENDS, K, kernels, make_projector, one_line
from test_gradients import Smooth
from torch import Tensor, nn
from torch.autograd import forward_ad

from defgan_fast import gradients, reference

Function = Callable[[Tensor], Tensor]


class Half(nn.Module):
    def __init__(self, projector: nn.Module) -> None:
        super().__init__()
        self.projector = projector

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x + 0.5 * self.projector(x)


def backward(f: Function, x: Tensor, v: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(f(x), x, v)
    return found


def dual(f: Function, x: Tensor, v: Tensor) -> Tensor:
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(x, v))).tangent
        return torch.zeros_like(x) if tangent is None else tangent


def row_of_jacobian(jacobian: Callable[..., Tensor]) -> Callable[[Function, Tensor, Tensor], Tensor]:
    """Returns the Jacobian's product with one vector, as one of two columns: a whole Jacobian is large."""

    def product(f: Function, x: Tensor, v: Tensor) -> Tensor:
        def of_two(weights: Tensor) -> Tensor:
            return f(x + weights[0] * v + weights[1])

        return jacobian(of_two, torch.zeros(2))[..., 0]

    return product


REVERSE = {
    "backward": backward,
    "vjp": lambda f, x, v: torch.func.vjp(f, x)[1](v)[0],
    "grad": lambda f, x, v: torch.func.grad(lambda y: (f(y) * v).sum())(x),
    "jacrev": lambda f, x, v: torch.func.jacrev(lambda y: (f(y) * v).sum((1, 2, 3)))(x).sum(0),
    "vmap of vjp": lambda f, x, v: torch.func.vmap(lambda y: torch.func.vjp(f, y)[1](v)[0])(x[None])[0],
    "grad inside grad": lambda f, x, v: torch.func.grad(
        lambda c: (torch.func.grad(lambda y: (f(y) * v).sum())(x) * c).sum()
    )(torch.ones_like(x)),
}
FORWARD = {
    "forward_ad": dual,
    "jvp": lambda f, x, v: torch.func.jvp(f, (x,), (v,))[1],
    "vmap of jvp": lambda f, x, v: torch.func.vmap(lambda w: torch.func.jvp(f, (x,), (w,))[1])(v[None])[0],
    "jacfwd": row_of_jacobian(lambda f, at: torch.func.jacfwd(f)(at)),
    "forward-mode": row_of_jacobian(
        lambda f, at: torch.autograd.functional.jacobian(f, at, strategy="forward-mode", vectorize=True)
    ),
    "jvp in jvp": lambda f, x, v: torch.func.jvp(
        lambda c: torch.func.jvp(f, (x,), (v * c,))[1], (torch.ones(()),), (torch.ones(()),)
    )[1],
}
WAYS = REVERSE | FORWARD


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", WAYS)
def test_straight_through_is_the_identity(images: Tensor, backend: str, way: str) -> None:
    v = torch.randn(images.shape, generator=torch.Generator().manual_seed(3))
    found = WAYS[way](Half(make_projector(backend=backend)), images, v)
    torch.testing.assert_close(found, v, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", WAYS)
def test_none_raises(images: Tensor, backend: str, way: str) -> None:
    module = Half(make_projector(backend=backend, gradient="none"))
    with pytest.raises(RuntimeError, match=r"none.*straight_through.*unrolled") as caught:
        WAYS[way](module, images, torch.ones_like(images))
    one_line(caught)


@pytest.mark.filterwarnings("ignore:running on the reference path")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", WAYS)
def test_unrolled_goes_through_all_steps(backend: str, way: str) -> None:
    """Against central differences in float64 of the reference, by a random bilinear form."""
    torch.manual_seed(5)
    generator = Smooth(True)
    x, v, w = torch.rand(3, 2, 1, 2, 2).double()
    twin = make_projector(Smooth(True).double(), steps=4, lr=2.0)
    twin.generator.load_state_dict(generator.state_dict())
    exact = Half(twin)
    slope = ((exact(x + 1e-6 * v) - exact(x - 1e-6 * v)) * w).sum() / 2e-6
    module = Half(make_projector(generator, steps=4, lr=2.0, gradient="unrolled", backend=backend))
    given, other = (w, v) if way in REVERSE else (v, w)
    refused = {"jvp in jvp": "no second derivative", "forward-mode": "Batching rule not implemented"}.get(way)
    if refused is not None:
        with pytest.raises(RuntimeError, match=refused):
            WAYS[way](module, x.float(), given.float())
        return
    found = WAYS[way](module, x.float(), given.float())
    assert abs(slope - 0.5 * (v * w).sum()) > 1e-2, "the case cannot tell a lost tie"
    torch.testing.assert_close((found.double() * other).sum(), slope, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:running on the reference path")
@pytest.mark.parametrize("lowerable", [True, False])
def test_unrolled_passes_gradcheck_in_forward_mode(lowerable: bool) -> None:
    torch.manual_seed(2)
    projector = make_projector(
        Smooth(lowerable).double(), steps=3, restarts=2, lr=2.0, decay_at=0.5, gradient="unrolled"
    )
    x = torch.rand(2, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(projector, (x,), eps=1e-6, atol=1e-8, check_forward_ad=True)


SECOND = {
    "twice backward": lambda f, x, v: torch.autograd.grad(
        torch.autograd.grad(f(x.requires_grad_()), x, create_graph=True)[0], x, v
    )[0],
    "grad of grad": lambda f, x, v: torch.func.grad(lambda y: (torch.func.grad(f)(y) * v).sum())(x),
    "forward over reverse": lambda f, x, v: torch.func.jvp(torch.func.grad(f), (x,), (v,))[1],
    "reverse over forward": lambda f, x, v: torch.func.grad(lambda y: torch.func.jvp(f, (y,), (v,))[1])(x),
    "dual of grad": lambda f, x, v: dual(torch.func.grad(f), x, v),
    "vmap of hessian": lambda f, x, v: (
        torch.vmap(torch.func.hessian(lambda w: f(x + w * v)))(torch.zeros(1))[0] * v
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", SECOND)
def test_straight_through_has_a_second_derivative(images: Tensor, backend: str, way: str) -> None:
    """Of the sum of squares: twice the direction, or twice its square length for all directions at once."""
    projector = make_projector(backend=backend)
    x, v = images.clone(), torch.randn(images.shape, generator=torch.Generator().manual_seed(3))
    found = SECOND[way](lambda y: projector(y).square().sum(), x, v)
    expected = 2 * v * (v.square().sum() if way == "vmap of hessian" else 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_forward_and_reverse_mode_are_adjoint() -> None:
    torch.manual_seed(1)
    generator, z0 = Smooth(True).double(), torch.randn(3, 3, dtype=torch.float64)
    x, v, w = torch.rand(3, 3, 1, 2, 2, dtype=torch.float64)
    arguments = generator, x, z0, [2.0, 1.5, 0.2], 0.7
    forward = (reference.unrolled_tangent(*arguments, v) * w).sum()
    torch.testing.assert_close(
        forward, (reference.unrolled_gradient(*arguments, w) * v).sum(), rtol=1e-12, atol=0
    )
    assert reference.unrolled_tangent(generator, x[:0], z0[:0], [1.0], 0.7, v[:0]).shape == (0, 1, 2, 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", SECOND)
def test_unrolled_has_no_second_derivative_and_says_so(backend: str, way: str) -> None:
    torch.manual_seed(5)
    projector = make_projector(Smooth(True), steps=2, gradient="unrolled", backend=backend)
    x = torch.rand(2, 1, 2, 2)

    def loss(y: Tensor) -> Tensor:
        return projector(y).square().sum()

    with pytest.raises(RuntimeError, match="has no second derivative") as caught:
        SECOND[way](loss, x, torch.ones_like(x))
    one_line(caught)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gradient", ["straight_through", "unrolled", "none"])
def test_vmap_projects_as_one_batch(images: Tensor, backend: str, gradient: str) -> None:
    projector = make_projector(backend=backend, gradient=gradient)
    pairs = images.view(2, 2, 1, 28, 28)
    close = torch.equal if backend == "cpu" else torch.allclose
    assert close(torch.vmap(projector)(pairs).flatten(0, 1), projector(images))
    turned = torch.vmap(projector, in_dims=1, out_dims=1)(pairs.movedim(0, 1))
    assert close(turned, projector(images).view(2, 2, 1, 28, 28).movedim(0, 1))
    for shape in [(3, K), (2, 3, K)]:
        starts = torch.randn(2, *shape)
        expected = [projector.project(x, z0=z).images for x, z in zip(pairs, starts, strict=True)]
        found = torch.vmap(lambda x, z: projector.project(x, z0=z).images)(pairs, starts)
        assert close(found, torch.stack(expected))
        found = torch.vmap(lambda z: projector.project(pairs[0], z0=z).images)(starts)
        assert close(found[0], expected[0])
    assert torch.vmap(projector)(pairs[:, :0]).shape == (2, 0, 1, 28, 28)
    with pytest.raises(ValueError, match="images must be finite"):
        torch.vmap(projector)(pairs / 0)


@kernels
def test_vmap_refuses_batched_parameters(images: Tensor) -> None:
    projector = make_projector()
    two = {name: torch.stack([p, p]) for name, p in projector.named_parameters()}

    def call(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(projector, parameters, (images,))

    with pytest.raises(NotImplementedError, match="parameters must be the same for all of vmap's calls"):
        torch.vmap(call)(two)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_are_constants_to_functional_training(images: Tensor, backend: str) -> None:
    """As in a functional training loop over a whole defended model, whose gradients include the generator's names."""
    model = nn.Sequential(make_projector(backend=backend), nn.Flatten(), nn.Linear(784, 10))
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(p: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, p, (images,)).square().sum()

    found = torch.func.grad(loss)(parameters)
    assert found["2.weight"].abs().sum() > 0
    assert all((g == 0).all() for name, g in found.items() if name.startswith("0."))


# --- graphs that were recorded with an image that requires no gradient ---------------------------------------------


def exported(module: nn.Module, x: Tensor) -> Function:
    return torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()


def decomposed(module: nn.Module, x: Tensor) -> Function:
    return torch.export.export(module, (x,)).run_decompositions().module()


def traced(module: nn.Module, x: Tensor) -> Function:
    return torch.jit.trace(module, (x,))


def by_make_fx(module: nn.Module, x: Tensor) -> Function:
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(module)(x)


def functionalized(module: nn.Module, x: Tensor) -> Function:
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(torch.func.functionalize(module))(x)


def compiled(module: nn.Module, x: Tensor) -> Function:
    torch._dynamo.reset()
    found = torch.compile(module, backend="aot_eager", fullgraph=True)
    found(x)
    return found


RECORDERS = [exported, decomposed, traced, by_make_fx, functionalized, compiled]


@kernels
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("record", RECORDERS)
@pytest.mark.parametrize("gradient", ["straight_through", "unrolled", "none"])
def test_recorded_graphs_keep_the_tie(images: Tensor, record: Callable, gradient: str) -> None:
    module = Half(make_projector(gradient=gradient))
    graph = record(module, images)
    x = images.flip(0).clone()  # not the example
    assert torch.equal(graph(x), module(x))
    weight = torch.randn(x.shape)
    for way in (backward, dual):
        if gradient == "none":
            with pytest.raises(RuntimeError, match=r"none.*straight_through.*unrolled|forward AD"):
                way(graph, x, weight)
        else:
            expected = weight if gradient == "straight_through" else way(module, x, weight)
            if (
                record is decomposed and way is dual
            ):  # torch drops `detach` from such graphs, and forward mode with it
                with pytest.raises(NotImplementedError, match="forward AD"):
                    way(graph, x, weight)
            else:
                torch.testing.assert_close(way(graph, x, weight), expected)


@pytest.mark.parametrize("gradient", ["straight_through", "unrolled"])
def test_graphs_of_the_reference_path(images: Tensor, gradient: str) -> None:
    """Its steps are in the graph themselves, and a tie that no graph can hold raises when it is differentiated."""
    module = Half(make_projector(backend="reference", gradient=gradient, validate=False))
    graph = by_make_fx(module, images)
    torch.testing.assert_close(graph(images), module(images))
    if gradient == "straight_through":
        assert (backward(graph, images, torch.ones_like(images)) == 1).all()
    else:
        with pytest.raises(RuntimeError, match="without a plan is no part of a recorded graph"):
            backward(graph, images, torch.ones_like(images))


# --- bits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_tie_keeps_all_bits(dtype: torch.dtype) -> None:
    """Of zeros of both signs, infinities and NaN in the reconstruction, whatever the images are."""
    odd = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-40, 1.0], dtype=dtype)
    reconstruction, images = torch.cartesian_prod(odd, odd).T.contiguous()
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    for x in (images, images.clone().requires_grad_()):
        for found in (
            gradients.straight_through(x, reconstruction),
            gradients.no_gradient(x, reconstruction, ""),
        ):
            assert torch.equal(found.detach().view(whole), reconstruction.view(whole))
    gradients.straight_through(x, reconstruction).sum().backward()
    assert (x.grad == 1).all(), "infinite and NaN images have the same gradient as others"


def test_the_tie_shares_nothing() -> None:
    x, r = torch.zeros(2), torch.ones(2)
    with forward_ad.dual_level():
        given = torch.ones(2)
        tied = gradients.straight_through(forward_ad.make_dual(x, given), r)
        given.zero_()
        assert (forward_ad.unpack_dual(tied).tangent == 1).all()
    gradients.straight_through(x, r).zero_()
    assert (r == 1).all()
