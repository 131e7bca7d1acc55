"""The ops under torch's own checks and tools: schema, fake kernels and autograd by `opcheck`, torch.compile without
graph breaks, torch.export to a file that another process loads, and bad arguments given to the ops themselves.
"""

from __future__ import annotations

import functools
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from generators import PaperGenerator, scale_up
from torch import Tensor, nn

from defgan_fast import Projector, gradients
from defgan_fast.kernels import ops
from defgan_fast.plan import lower
from defgan_fast.starts import starting_points

kernels = pytest.mark.skipif(not ops.kernels_available, reason="needs the compiled kernels")
K = 8


@pytest.fixture(scope="module")
def generator() -> PaperGenerator:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        generator = PaperGenerator(latent_size=K, width=4)
        scale_up(generator)
    return generator.eval()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(2))


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def make_projector(generator: nn.Module, **arguments) -> Projector:
    return Projector(generator, **{"steps": 3, "restarts": 2, "lr": 8.0, **arguments})


def plan_of(generator: nn.Module) -> tuple[str, list[Tensor]]:
    plan = lower(generator, K)
    return plan.text, [p.detach() for p in plan.tensors(generator)]


def project_arguments(generator: nn.Module, images: Tensor, **changes) -> tuple:
    text, parameters = plan_of(generator)
    named = {
        "images": images,
        "z0": torch.randn(2, K),
        "parameters": parameters,
        "plan": text,
        "lr_schedule": [8.0, 0.8],
        "momentum": 0.7,
        "precision": "float32",
        "max_rows": 0,
        "validate": True,
        "radius": 0.0,
    }
    assert set(changes) <= set(named)
    return tuple({**named, **changes}.values())


# --- opcheck ------------------------------------------------------------------------------------------------


@kernels
def test_opcheck_project(generator: nn.Module, images: Tensor) -> None:
    op = torch.ops.defgan_fast.project.default
    for changes in (
        {},
        {"images": images[:0].bfloat16()},
        {
            "images": images.half().to(memory_format=torch.channels_last),
            "z0": torch.randn(3, 4, K),
            "max_rows": 1,
        },
        {"radius": 1.5},
        {"lr_schedule": []},
    ):
        torch.library.opcheck(op, project_arguments(generator, **{"images": images, **changes}))


@kernels
@pytest.mark.parametrize(
    ("keep_steps", "keep_rows"), [([], []), ([0], [1]), ([1, 2], [3, 2])], ids=["all", "at_once", "twice"]
)
def test_opcheck_project_keeping(
    generator: nn.Module, images: Tensor, keep_steps: list[int], keep_rows: list[int]
) -> None:
    op = torch.ops.defgan_fast.project_keeping.default
    given = {"z0": torch.randn(4, K), "lr_schedule": [8.0, 2.0, 0.8]}
    for x in (images, images[:0].bfloat16()):
        arguments = project_arguments(generator, x, **given, radius=2.0)
        torch.library.opcheck(op, (*arguments, keep_steps, keep_rows))


@kernels
def test_opcheck_decode(generator: nn.Module) -> None:
    text, parameters = plan_of(generator)
    for rows in (0, 5):
        torch.library.opcheck(
            torch.ops.defgan_fast.decode.default, (torch.randn(rows, K), parameters, text, 0)
        )


LAYOUTS = {
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "strided": lambda x: x.bfloat16().repeat_interleave(2, 3)[..., ::2],
    "empty": lambda x: x[:0],
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_opcheck_straight_through(layout: str) -> None:
    x = LAYOUTS[layout](torch.rand(3, 2, 4, 5)).detach().requires_grad_()
    torch.library.opcheck(gradients.straight_through, (x, torch.rand(x.shape).to(x.dtype)))


def test_opcheck_no_gradient() -> None:
    """Without a gradient, which would raise as it should."""
    torch.library.opcheck(gradients.no_gradient, (torch.rand(3, 2, 4, 5), torch.rand(3, 2, 4, 5), "why"))


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_opcheck_unrolled(generator: nn.Module, images: Tensor, layout: str) -> None:
    text, parameters = plan_of(generator)
    x = LAYOUTS[layout](images).detach().requires_grad_()
    z0 = torch.randn(len(x), K)
    for radius, steps in ((0.0, None), (2.0, torch.arange(len(x)) % 2)):
        reconstruction = torch.rand(x.shape).to(x.dtype)
        torch.library.opcheck(
            gradients.unrolled, (x, reconstruction, z0, parameters, text, [2.0, 0.2], 0.7, radius, steps)
        )
        for op in (gradients.unrolled_gradient, gradients.unrolled_tangent):
            given = torch.randn(x.shape).to(x.dtype)
            torch.library.opcheck(op, (given, x.detach(), z0, parameters, text, [2.0], 0.7, radius, steps))


def test_opcheck_starting_points() -> None:
    op = torch.ops.defgan_fast.starting_points.default
    torch.library.opcheck(op, (-7, 3, 5))
    assert torch.equal(op(4, 3, 5), starting_points(4, 3, 5))


@kernels
def test_fake_kernels_know_shapes(generator: nn.Module, images: Tensor) -> None:
    arguments = project_arguments(generator, images.bfloat16())
    latents, errors = torch.ops.defgan_fast.project(*arguments)
    meta = [a.to("meta") if isinstance(a, Tensor) else a for a in arguments]
    for fake, real in zip(torch.ops.defgan_fast.project(*meta), (latents, errors), strict=True):
        assert fake.shape == real.shape
        assert fake.dtype == real.dtype == torch.float32


@kernels
def test_ops_are_pure(generator: nn.Module, images: Tensor) -> None:
    """Nothing is written to the arguments, nothing returned aliases them, and no step returns z0's own values."""
    arguments = project_arguments(generator, images, lr_schedule=[])
    copies = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
    latents, _ = torch.ops.defgan_fast.project(*arguments)
    assert torch.equal(latents, arguments[1].expand(3, 2, K))
    assert latents.untyped_storage().data_ptr() != arguments[1].untyped_storage().data_ptr()
    assert all(torch.equal(a, b) for a, b in zip(arguments, copies, strict=True) if isinstance(a, Tensor))


@kernels
def test_kernels_have_no_derivative_of_their_own(generator: nn.Module, images: Tensor) -> None:
    """Asked for one they raise: never a detached result that looks as if it had a gradient."""
    latents, errors = torch.ops.defgan_fast.project(*project_arguments(generator, images.requires_grad_()))
    for out in (latents, errors):
        assert out.requires_grad
        with pytest.raises(RuntimeError, match="defgan_fast"):
            out.sum().backward(retain_graph=True)


@pytest.mark.parametrize(
    "op", [gradients.straight_through, functools.partial(gradients.no_gradient, reason="")]
)
def test_ties_keep_the_bits_and_share_no_memory(op) -> None:
    x, reconstruction = torch.rand(2, 1, 3, 3, requires_grad=True), torch.rand(2, 1, 3, 3)
    out = op(x, reconstruction)
    assert torch.equal(out, reconstruction)
    assert out.data_ptr() != reconstruction.data_ptr()
    for mode in (torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", dtype=torch.bfloat16)):
        with mode():
            again = op(x, reconstruction)
        assert torch.equal(again, reconstruction)
        assert again.dtype == torch.float32


# --- bad arguments to the ops -------------------------------------------------------------------------------


@kernels
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"images": torch.zeros(2, 1, 28, 27)}, ValueError, r"images must have .*1, 28, 28\], got \[2, 1, 28, 27\]"),
        ({"images": torch.zeros(2, 784)}, ValueError, r"images must have shape \[B, 1, 28, 28\], got \[2, 784\]"),
        ({"images": torch.zeros(2, 1, 28, 28).byte()}, TypeError, "images must have dtype float32.*, got uint8"),
        ({"images": torch.zeros(2, 1, 28, 28).double()}, TypeError, "images must have dtype .*, got float64"),
        ({"images": torch.full((2, 1, 28, 28), torch.nan)}, ValueError, "images must be finite"),
        ({"images": torch.full((2, 1, 28, 28), 255.0)}, ValueError, r"range \[0, 1\], got \[255, 255\]"),
        ({"z0": torch.zeros(2, 9)}, ValueError, r"z0 must have shape \[R, 8\] or \[3, R, 8\].*, got \[2, 9\]"),
        ({"z0": torch.zeros(2, 2, K)}, ValueError, "z0 must have shape"),
        ({"z0": torch.zeros(0, K)}, ValueError, "z0 must have shape"),
        ({"z0": torch.zeros(K)}, ValueError, "z0 must have shape"),
        ({"z0": torch.zeros(2, K).long()}, TypeError, "z0 must have dtype .*, got int64"),
        ({"z0": torch.full((2, K), torch.inf)}, ValueError, "z0 must be finite"),
        ({"precision": "float16"}, ValueError, "precision must be .*got .float16.*bfloat16"),
        ({"precision": "double"}, ValueError, "precision must be .*double"),
        ({"max_rows": -1}, ValueError, "max_rows must be .*, got -1"),
        ({"radius": -1.0}, ValueError, r"radius must be finite and at least 0 \(0: free\), got -1"),
        ({"radius": torch.inf}, ValueError, "radius must be finite .*, got inf"),
        ({"parameters": []}, ValueError, "parameter"),
        ({"plan": "rubbish"}, ValueError, "rubbish"),
    ],
)  # fmt: skip
def test_bad_arguments(generator, images, changes: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        torch.ops.defgan_fast.project(*project_arguments(generator, **{"images": images, **changes}))
    assert "\n" not in str(caught.value)


@kernels
@pytest.mark.parametrize(
    ("steps", "rows", "message"),
    [
        ([1], [1, 1], "keep_steps and keep_rows must have the same length, got 1 and 2"),
        ([2], [1], r"keep_steps must rise and lie in \[0, 2\), got \[2\]"),
        ([-1], [1], r"keep_steps must .*, got \[-1\]"),
        ([1, 1], [2, 1], r"keep_steps must .*, got \[1, 1\]"),
        ([0], [0], r"keep_rows must be at least 1 and never rise, got \[0\]"),
        ([0, 1], [1, 2], r"keep_rows must .*, got \[1, 2\]"),
    ],
)
def test_bad_keeps(generator, images, steps: list[int], rows: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        torch.ops.defgan_fast.project_keeping(*project_arguments(generator, images), steps, rows)


@kernels
def test_parameters_of_another_generator_are_an_error(generator: nn.Module, images: Tensor) -> None:
    """Sizes are checked against the plan: never read beyond a tensor's end."""
    text, parameters = plan_of(generator)
    for i in range(len(parameters)):
        wrong = list(parameters)
        wrong[i] = wrong[i].flatten()[:-1]
        with pytest.raises(ValueError, match="elements"):
            torch.ops.defgan_fast.decode(torch.zeros(1, K), wrong, text, 0)
    with pytest.raises(TypeError, match="floating"):
        torch.ops.defgan_fast.decode(torch.zeros(1, K), [p.long() for p in parameters], text, 0)
    with pytest.raises(ValueError, match=r"latents must have shape \[B, 8\], got \[1, 9\]"):
        torch.ops.defgan_fast.decode(torch.zeros(1, 9), parameters, text, 0)


@kernels
def test_parameters_in_any_layout(generator: nn.Module, images: Tensor) -> None:
    text, parameters = plan_of(generator)
    z = torch.randn(2, K)
    expected = torch.ops.defgan_fast.decode(z, parameters, text, 0)
    strided = [p.unsqueeze(-1).expand(*p.shape, 2).contiguous()[..., 0] for p in parameters]
    assert not strided[0].is_contiguous()
    assert torch.equal(torch.ops.defgan_fast.decode(z, strided, text, 0), expected)
    assert torch.equal(torch.ops.defgan_fast.decode(z.t().contiguous().t(), parameters, text, 0), expected)


# --- torch.compile ------------------------------------------------------------------------------------------


@kernels
@pytest.mark.parametrize("dynamic", [None, True])
def test_compile_forward(generator: nn.Module, images: Tensor, dynamic: bool | None) -> None:
    projector = make_projector(generator)
    compiled = torch.compile(projector, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for x in (images, images[:2]):
        assert torch.equal(compiled(x), projector(x))
    with torch.no_grad():
        assert torch.equal(compiled(images), projector(images))


@kernels
@pytest.mark.parametrize("gradient", ["straight_through", "unrolled"])
def test_compile_backward(generator: nn.Module, images: Tensor, gradient: str) -> None:
    """In front of a classifier, with a dynamic batch; the same gradients as without the compiler."""
    model = nn.Sequential(make_projector(generator, gradient=gradient), nn.Flatten(), nn.Linear(784, 10))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for x in (images, images[:2], images.to(memory_format=torch.channels_last)):
        gradients = []
        for function in (model, compiled):
            y = x.clone().requires_grad_()
            out = function(y)
            out.square().sum().backward()
            gradients.append((out.detach(), y.grad))
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-6)
        assert gradients[0][1].abs().max() > 0
    with pytest.raises(ValueError, match="images must be finite"):
        compiled(images * torch.nan)


@kernels
def test_compile_without_a_gradient_still_raises(generator: nn.Module, images: Tensor) -> None:
    """Inside a compiled graph too, an attack must not get silent zeros."""
    compiled = torch.compile(make_projector(generator, gradient="none"), backend="aot_eager")
    with pytest.raises(RuntimeError, match="straight_through"):
        compiled(images.requires_grad_()).sum().backward()


@kernels
def test_compile_project_with_starting_points(generator: nn.Module, images: Tensor) -> None:
    projector = make_projector(generator)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def both(x: Tensor, z0: Tensor) -> tuple[Tensor, ...]:
        return (*projector.project(x, z0=z0), projector.project(x, seed=9).images)

    z0 = torch.randn(3, 4, K)
    expected = (*projector.project(images, z0=z0), projector.project(images, seed=9).images)
    for a, b in zip(both(images, z0), expected, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)  # every_image was not asked for


@kernels
def test_compile_notices_changed_weights(images: Tensor) -> None:
    torch.manual_seed(3)
    generator = PaperGenerator(K, 4)
    scale_up(generator)
    projector = make_projector(generator)
    compiled = torch.compile(projector, fullgraph=True, backend="aot_eager")
    before = compiled(images)
    generator.linear.weight.data.mul_(1.5)
    after = compiled(images)
    assert not torch.equal(before, after)
    assert torch.equal(after, projector(images))


@kernels
def test_compile_under_autocast(generator: nn.Module, images: Tensor) -> None:
    projector = make_projector(generator)
    compiled = torch.compile(projector, fullgraph=True, backend="aot_eager")
    narrow = make_projector(generator, precision="bfloat16")(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(compiled(images), narrow)
    assert torch.equal(compiled(images), projector(images))
    assert not torch.equal(narrow, projector(images))


@kernels
def test_compile_fresh_points(generator: nn.Module, images: Tensor) -> None:
    """A randomised defence stays one: the compiler must not bake a draw in."""
    projector = make_projector(generator, seed=None)
    compiled = torch.compile(projector, fullgraph=True, backend="aot_eager")
    assert not torch.equal(compiled(images), compiled(images))


@kernels
@pytest.mark.slow
def test_compile_with_inductor(generator: nn.Module, images: Tensor) -> None:
    """The default compiler, forward and backward in front of a classifier, for two batch sizes."""
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    model = nn.Sequential(make_projector(generator), classifier)
    compiled = torch.compile(model, fullgraph=True)
    for x in (images, images[:2]):
        y, z = x.clone().requires_grad_(), x.clone().requires_grad_()
        out = compiled(y)
        torch.testing.assert_close(out, model(z), rtol=1e-5, atol=1e-5)
        out.square().sum().backward()
        model(z).square().sum().backward()
        torch.testing.assert_close(y.grad, z.grad, rtol=1e-4, atol=1e-5)


# --- torch.export -------------------------------------------------------------------------------------------


@kernels
def test_export(generator: nn.Module, images: Tensor, tmp_path: Path) -> None:
    """With a dynamic batch, to a file; another process that loads it gets the same bits for other batch sizes."""
    projector = make_projector(generator)
    batch = torch.export.Dim("batch")
    program = torch.export.export(projector, (images,), dynamic_shapes={"images": {0: batch}})
    targets = [str(node.target) for node in program.graph.nodes]
    assert any("defgan_fast.project" in target for target in targets), "the op must stay one op"
    torch.export.save(program, tmp_path / "projector.pt2")
    more = torch.rand(7, 1, 28, 28)
    inputs = [images, more, more[:1], more[:2]]
    torch.save(inputs, tmp_path / "inputs.pt")
    loader = """
        import sys, torch
        import defgan_fast
        folder = sys.argv[1]
        loaded = torch.export.load(folder + "/projector.pt2").module()
        torch.save([loaded(x) for x in torch.load(folder + "/inputs.pt")], folder + "/outputs.pt")
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(loader), str(tmp_path)], check=True, timeout=120)
    for got, x in zip(torch.load(tmp_path / "outputs.pt"), inputs, strict=True):
        assert torch.equal(got, projector(x))
    loaded = torch.export.load(tmp_path / "projector.pt2").module()
    assert torch.equal(loaded(more), projector(more))
    with pytest.raises(ValueError, match="images must be finite"):
        loaded(images * torch.nan)


@kernels
def test_export_of_a_defended_classifier(generator: nn.Module, images: Tensor) -> None:
    model = nn.Sequential(make_projector(generator), nn.Flatten(), nn.Linear(784, 10)).eval()
    program = torch.export.export(
        model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=True
    )
    more = torch.rand(5, 1, 28, 28)
    torch.testing.assert_close(program.module()(more), model(more), rtol=1e-5, atol=1e-5)


# --- importing ----------------------------------------------------------------------------------------------


def test_importing_does_not_load_the_compiler() -> None:
    """torch._dynamo takes most of a second, and several decorators of torch.compiler import it."""
    program = "import sys, torch, defgan_fast; print('torch._dynamo' in sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert loaded.stdout == "False\n"


def test_constant_result_is_marked_as_torch_marks_it() -> None:
    marked = torch.compiler.assume_constant_result(lambda: None)
    assert vars(marked).items() <= vars(ops.cuda_kernels_run_on).items()
    assert vars(marked)
