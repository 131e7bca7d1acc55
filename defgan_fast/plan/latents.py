"""Which latents a generator takes: how many numbers, and in which shape."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

LARGEST = 2**20
"""Latents of more numbers are not tried: a wrong declaration must not fill the memory."""


def latent_size_of(generator: nn.Module) -> int | None:
    """Returns k, from the first layer that has weights if the generator then runs, else `generator.latent_size`.

    None where neither gives a size that the generator runs with.
    """
    for size in _candidates(generator):
        if _form_of(generator, size) is not None:
            return size
    return None


def takes_maps(generator: nn.Module, latent_size: int) -> bool:
    """Returns whether the generator takes latents as [N, k, 1, 1] (as DCGAN does) and not as [N, k]."""
    return _form_of(generator, latent_size) == "maps"


def decoder_of(generator: nn.Module, latent_size: int) -> Callable[[Tensor], Tensor]:
    """Returns the generator as a function of latents [N, k], whether it takes them so or as [N, k, 1, 1]."""
    if takes_maps(generator, latent_size):
        return lambda z: generator(z[:, :, None, None])
    return generator


def probe_of(generator: nn.Module, latent_size: int) -> Tensor:
    """Returns three random latents [3, k] of the generator's dtype and device.

    They are always the same, and the caller's random state is left alone.
    """
    like = next((p for p in generator.parameters() if p.is_floating_point()), torch.empty(0, device="cpu"))
    rng = torch.Generator("cpu").manual_seed(0)
    # Dtype and device are named because the caller may have set other defaults for the process.
    return torch.randn(3, latent_size, generator=rng, dtype=torch.float32, device="cpu").to(like)


def failure_of(generator: nn.Module) -> str | None:
    """Returns what happens with latents of the likeliest size, in one clause; None where nothing tells a size."""
    for size in _candidates(generator):
        return failure_with(generator, size)
    return None


def failure_with(generator: nn.Module, latent_size: int) -> str | None:
    """Returns what happens with latents of a size, in one clause; None where the generator takes them in some form."""
    if not 0 <= latent_size <= LARGEST:
        return f"latents of {latent_size} numbers are not tried, {LARGEST} at most"
    if _form_of(generator, latent_size) is not None:
        return None
    try:
        _outputs(generator, probe_of(generator, latent_size))
    except Exception as error:
        line = (str(error).splitlines() or [""])[0]
        return f"with latents [3, {latent_size}] it raises {type(error).__name__}: {line}"
    return None


def check_takes_latents_alone(generator: nn.Module) -> None:
    """Checks that a generator can be called with latents and nothing else.

    Raises:
        TypeError: its forward needs more, as that of a conditional generator does.
    """
    try:
        signature = inspect.signature(generator.forward)
    except (TypeError, ValueError):
        return  # a forward written in C has none
    try:
        signature.bind(None)
    except TypeError as error:
        raise TypeError(
            f"generator {type(generator).__name__} must take latents alone, got forward{signature} ({error}): "
            "wrap it in a module that fixes the other arguments"
        ) from None


def _candidates(generator: nn.Module) -> Iterator[int]:
    """Yields the sizes to try, the likelier first."""
    for module in generator.modules():
        if isinstance(module, nn.Linear):
            yield module.in_features
        elif isinstance(module, nn.ConvTranspose2d | nn.Conv2d):
            yield module.in_channels
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            yield module.num_features
        else:
            continue
        break
    declared = getattr(generator, "latent_size", None)
    if isinstance(declared, int):
        yield declared


def _form_of(generator: nn.Module, latent_size: int) -> str | None:
    """Returns "rows" where the generator runs on latents [N, k], else "maps" for [N, k, 1, 1], else None."""
    if not 0 <= latent_size <= LARGEST:
        return None
    probe = probe_of(generator, latent_size)
    for form, latents in (("rows", probe), ("maps", probe[:, :, None, None])):
        try:
            _outputs(generator, latents)
        except Exception:
            continue
        return form
    return None


def _outputs(generator: nn.Module, latents: Tensor) -> Any:
    kind = "cpu" if latents.is_meta else latents.device.type  # the meta device has no autocast
    with torch.no_grad(), torch.autocast(kind, enabled=False):
        return generator(latents)
