"""A projector inside what torch wraps around modules: DataParallel, DistributedDataParallel, the meta device; and
images in another range than the generator's.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from generators import PaperGenerator
from projectors import BACKENDS, K, make_generator, make_images, make_projector, one_line, same
from torch import Tensor, nn

from defgan_fast import Projector

OWN = {"starts": "nearest", "candidates": torch.randn(32, K, generator=torch.Generator().manual_seed(1))}


def replicate(module: nn.Module, device: str) -> nn.Module:
    """Returns what nn.parallel.replicate makes of a module for one device, which it does for GPUs alone."""
    replica = module._replicate_for_data_parallel()
    replica._former_parameters = {}
    for name, child in module._modules.items():
        copied = replicate(child, device)
        replica._modules[name] = copied
    for name, parameter in module._parameters.items():
        copy = parameter.detach().to(device) + 0
        setattr(replica, name, copy)
        replica._former_parameters[name] = copy
    for name, buffer in module._buffers.items():
        replica._buffers[name] = buffer.to(device)
    return replica


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "arguments", [{}, {"starts": "nearest", "candidates": 32}, OWN], ids=["random", "drawn", "own"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_replicas_of_data_parallel(images: Tensor, backend: str, arguments: dict, dtype: torch.dtype) -> None:
    backend = "auto" if dtype == torch.float64 else backend
    projector = make_projector(make_generator().to(dtype), backend=backend, **arguments)
    expected = projector.project(images)
    replica = replicate(projector, "cpu")
    assert list(replica.parameters()) == [], "as torch makes them"
    assert replica.backend_for(images) == projector.backend_for(images)
    assert same(replica.project(images), expected)
    replica._latents = replica._own_candidates = None  # no copy may reach the others
    assert same(projector.project(images), expected)


def test_latents_follow_the_images_of_a_replica(images: Tensor) -> None:
    """The meta device stands for a second GPU."""
    projector = make_projector()
    replica = replicate(projector, "meta")
    assert projector._latents.device.type == "cpu"
    assert replica._drawn(images.to("meta"), None, 0).device.type == "meta"


def test_what_changed_is_noticed_before_replicas_are_made(images: Tensor) -> None:
    projector = make_projector()
    projector.generator.convolutions[1] = nn.LeakyReLU(0.5)
    expected = make_projector(projector.generator).project(images)
    assert same(replicate(projector, "cpu").project(images), expected)


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize(
    "arguments", [{}, {"starts": "nearest", "candidates": 32}, OWN], ids=["random", "drawn", "own"]
)
def test_to_meta_and_back(images: Tensor, backend: str | None, arguments: dict) -> None:
    known = make_projector(backend=backend or "auto", **arguments)
    expected = known.project(images)
    if backend is None:
        with torch.device("meta"):
            projector = make_projector(PaperGenerator(K, 4), **arguments)
    else:
        projector = make_projector(make_generator(), backend=backend, **arguments).to("meta")
    with pytest.raises(ValueError, match=r"images must be on the generator's device \(meta\), got cpu"):
        projector(images)
    with pytest.raises(
        ValueError, match="images must have values, got a tensor of the meta device"
    ) as caught:
        projector(images.to("meta"))
    one_line(caught)
    projector.to_empty(device="cpu").load_state_dict(known.state_dict())
    assert same(projector.project(images), expected)
    assert projector.backend_for(images) == known.backend_for(images)


PARALLEL = """
import sys
import torch
import torch.distributed as dist
from torch import nn
sys.path.insert(0, sys.argv[1])
from projectors import make_images, make_projector

rank, how, file = int(sys.argv[2]), sys.argv[3], sys.argv[4]
dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
torch.manual_seed(0)
projector = make_projector()
model = nn.Sequential(projector, nn.Flatten(), nn.Linear(784, 10))
if how == "frozen":
    projector.requires_grad_(False)
before = {name: p.clone() for name, p in model.named_parameters()}
wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=how == "unused")
optimiser = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
images = make_images(projector.generator, 4)[2 * rank :][:2]
for _ in range(2):
    optimiser.zero_grad()
    try:
        wrapped(images).square().sum().backward()
    except RuntimeError as error:
        print(error)
        sys.exit(3)
    optimiser.step()
for name, p in model.named_parameters():
    assert torch.equal(p, before[name]) == name.startswith("0."), name
both = [torch.empty_like(model[2].weight) for _ in range(2)]
dist.all_gather(both, model[2].weight.detach())
assert torch.equal(*both)
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.parametrize("how", ["as it is", "frozen", "unused"])
def test_distributed_data_parallel(tmp_path: Path, how: str) -> None:
    """Two processes train a classifier behind a projector for two iterations, the second of which used to raise."""
    command = [sys.executable, "-c", PARALLEL, str(Path(__file__).parents[1])]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), how, str(tmp_path / "store")], stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=300)[0].strip() for rank in ranks]
    if how == "as it is":
        assert [rank.returncode for rank in ranks] == [3, 3]
        assert all("call projector.requires_grad_(False) before wrapping the model" in line for line in said)
        assert all("\n" not in line for line in said)
    else:
        assert [rank.returncode for rank in ranks] == [0, 0], said


def of_range(end: nn.Module, **arguments) -> tuple[Projector, Tensor]:
    generator = make_generator(end)
    return make_projector(generator, steps=1, **arguments), make_images(make_generator())


@pytest.mark.parametrize("backend", BACKENDS)
def test_images_of_another_range_are_warned_of_once(backend: str) -> None:
    projector, x = of_range(nn.Tanh(), backend=backend)
    assert x.min() >= 0
    with pytest.warns(UserWarning, match=r"generator's range \[-1, 1\].*pass 2 \* images - 1") as caught:
        projector(x)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        projector(x)
        other, _ = of_range(nn.Tanh(), backend=backend)
        other(2 * x - 1)
        other(x[:0])
        of_range(nn.Tanh(), backend=backend, validate=False)[0](x)
        of_range(nn.Sigmoid(), backend=backend)[0](x)
        if backend == "cpu":
            torch.compile(other, backend="eager", fullgraph=True)(x)
            torch.vmap(other)(x[None])
