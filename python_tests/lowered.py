"""Compares a lowered plan with the module that it came from.

The plan is run twice: by `interpret` in float64, where only a wrong plan can differ, and by the compiled
kernels (decode and one step of descent), which read the same text with a parser of their own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from generators import scale_up
from torch import Tensor, nn

from defgan_fast import reference
from defgan_fast.kernels import ops
from defgan_fast.plan import Plan, decoder_of, interpret, lower


def check(generator: nn.Module, k: int, kinds: list[str] | None = None, scale: bool = True) -> Plan:
    """Checks that both readers of the plan compute what the generator does; `kinds` are the layers expected in it."""
    if scale:
        scale_up(generator, 1.2)
    generator.eval()
    plan = lower(generator, k)
    if kinds is not None:
        assert [layer.kind for layer in plan.layers] == kinds, plan.text
    assert Plan.parse(plan.text).text == plan.text
    z = torch.randn(5, k, generator=torch.Generator().manual_seed(4))
    twin = copy.deepcopy(generator).double()
    decoder = decoder_of(twin, k)
    with torch.no_grad():
        expected = decoder(z.double())
        got = interpret(plan, plan.tensors(twin), z.double())
    assert got.shape == expected.shape
    assert expected.std() > 1e-3, "the generator is dead, nothing would be compared"
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    if ops.kernels_available:
        parameters = [p.detach() for p in plan.tensors(generator)]
        images = torch.ops.defgan_fast.decode(z, parameters, plan.text, 0)
        torch.testing.assert_close(
            images.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item()
        )
        target = expected.flip(0)[:2].float()
        rates = [1.0]
        z1, _ = reference.project(decoder, target.double(), z.double(), rates, 0.0)
        latents, errors = torch.ops.defgan_fast.project(
            target, z, parameters, plan.text, rates, 0.0, "float32", 0, False
        )
        gradient, ours = z.double() - z1, z.double() - latents.double()
        assert (gradient - ours).norm() < 1e-5 * gradient.norm() + 1e-6 * z.norm()
        torch.testing.assert_close(
            errors.double(),
            reference.reconstruction_errors(
                decoder, latents.flatten(0, 1).double(), target.double().repeat_interleave(5, 0)
            )
            .detach()
            .view(2, 5),
            rtol=1e-5,
            atol=1e-9,
        )
    return plan


def on_maps(*layers: nn.Module, c: int = 4, h: int = 5, w: int = 3, k: int = 6) -> nn.Sequential:
    """Returns the layers after a Linear that lays the latent out as [N, c, h, w]."""
    return nn.Sequential(nn.Linear(k, c * h * w), nn.Unflatten(1, (c, h, w)), *layers)


class Written(nn.Module):
    """Linear, a shape, a transposed convolution and an end, each spelled by the function given."""

    def __init__(self, shape: Callable[[Tensor], Tensor], end: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.convolution = nn.Linear(6, 24), nn.ConvTranspose2d(4, 2, 3, 2)
        self.shape, self.end = shape, end

    def forward(self, z: Tensor) -> Tensor:
        return self.end(self.convolution(self.shape(self.linear(z))))


def identity(x: Tensor) -> Tensor:
    return x


SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "view, size()": lambda h: h.view(h.size(0), 4, 2, 3),
    "view, shape": lambda h: h.view(h.shape[0], 4, 2, 3),
    "view, tuple": lambda h: h.view((-1, 4, 2, 3)),
    "reshape": lambda h: h.reshape(-1, 4, 2, 3),
    "torch.reshape": lambda h: torch.reshape(h, (-1, 4, 2, 3)),
    "len": lambda h: h.reshape(h.shape[0], 4, -1, 3),
    "unflatten": lambda h: h.unflatten(1, (4, 2, 3)),
    "torch.unflatten": lambda h: torch.unflatten(h, -1, (4, 2, 3)),
    "in two goes": lambda h: h.view(-1, 4, 6).unflatten(2, (2, 3)),
    "unsqueeze": lambda h: h.unsqueeze(2).unsqueeze(-1).reshape(-1, 4, 2, 3).contiguous(),
    "flatten and back": lambda h: torch.flatten(h.view(-1, 4, 2, 3), 1).view(-1, 4, 2, 3),
}
