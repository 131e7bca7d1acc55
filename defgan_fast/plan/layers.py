"""What a plan is made of, and its text form. `csrc/plan.h` holds the text's grammar and its other reader."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .activations import ACTIVATIONS

Shape = tuple[int, int, int]  # channels, height, width
Pair = tuple[int, int]  # vertical, horizontal


class LoweringError(ValueError):
    """A generator holds something that no kernel knows; the message names the generator and the layer."""


@dataclass(frozen=True)
class Layer:
    """One layer; parameters are indices into the plan's list, -1 where there is none.

    Attributes:
        kind: "linear", "conv_transpose", "conv", "map" (each output is one input, by crop and upsampling) or
            "reorder" (elements keep their order and get another shape).
        shape_in: (C, H, W) of the input as the kernels hold it.
        shape_out: (C, H, W) of the output.
        kernel: size of a convolution's kernel.
        stride: of a convolution; output o of a transposed one is stride * i + tap - pad.
        pad: see `stride`; rows and columns cut off at the top and at the left where it is a map's.
        upsample: factors of nearest upsampling, of a map or before a convolution.
        activation: a name of `activations.ACTIVATIONS`.
        slope: the leaky ReLU's below zero.
        weight: index of the matrix.
        bias: index of the bias.
        norm: indices of mean, variance, weight and bias of a BatchNorm between matrix and activation.
        eps: the BatchNorm's.
    """

    kind: str
    shape_in: Shape
    shape_out: Shape
    kernel: Pair = (0, 0)
    stride: Pair = (1, 1)
    pad: Pair = (0, 0)
    upsample: Pair = (1, 1)
    activation: str = "identity"
    slope: float = 0.0
    weight: int = -1
    bias: int = -1
    norm: tuple[int, int, int, int] | None = None
    eps: float = 0.0

    @property
    def has_matrix(self) -> bool:
        return self.kind in ("linear", "conv_transpose", "conv")

    @property
    def is_elementwise(self) -> bool:
        """Whether output i depends on input i alone."""
        return (
            self.kind == "map"
            and self.upsample == (1, 1)
            and self.pad == (0, 0)
            and self.shape_in == self.shape_out
        )

    def text(self) -> str:
        """Returns the layer's line of the plan's text."""
        words = [self.kind, f"in={_joined(self.shape_in)}", f"out={_joined(self.shape_out)}"]
        if self.kernel != (0, 0):
            words.append(f"kernel={_joined(self.kernel)}")
        words += [f"stride={_joined(self.stride)}", f"pad={_joined(self.pad)}"]
        words += [f"upsample={_joined(self.upsample)}", f"activation={self.activation}"]
        words += [f"weight={self.weight}", f"bias={self.bias}"]
        if self.activation == "leaky_relu":
            words.append(f"slope={self.slope!r}")
        if self.norm is not None:
            words += [f"eps={self.eps!r}", f"norm={','.join(map(str, self.norm))}"]
        return " ".join(words)


@dataclass(frozen=True)
class Plan:
    """A lowered generator.

    Attributes:
        layers: from the latent to the image.
        image_shape: (C, H, W) of the images that the generator returns.
        parameters: dotted names of the generator's tensors, in the order of the layers' indices; empty in a plan that
            was read from its text.
        text: the form that travels through the operators.
    """

    layers: tuple[Layer, ...]
    image_shape: Shape
    parameters: tuple[str, ...]
    text: str = field(init=False)

    def __post_init__(self) -> None:
        lines = [layer.text() for layer in self.layers]
        lines.append(f"image out={_joined(self.image_shape)}")
        object.__setattr__(self, "text", "\n".join(lines))

    @property
    def latent_size(self) -> int:
        return self.layers[0].shape_in[0]

    @property
    def output_range(self) -> tuple[float, float] | None:
        """The interval of the generator's pixels where the last layer bounds them."""
        return ACTIVATIONS[self.layers[-1].activation].output_range

    def tensors(self, generator: nn.Module) -> list[Tensor]:
        """Returns the generator's tensors as they are now, in the order that the plan numbers them."""
        return [_resolve(generator, name) for name in self.parameters]

    @staticmethod
    def parse(text: str) -> Plan:
        """Returns the plan of a text that `Plan.text` wrote; names of parameters are not part of it."""
        *lines, image = text.splitlines()
        return Plan(tuple(map(_layer, lines)), _shape(_values(image)["out"]), ())


def _layer(line: str) -> Layer:
    values = _values(line)
    norm: tuple[int, int, int, int] | None = None
    if "norm" in values:
        mean, variance, weight, bias = map(int, values["norm"].split(","))
        norm = (mean, variance, weight, bias)
    return Layer(
        line.split(maxsplit=1)[0],
        _shape(values["in"]),
        _shape(values["out"]),
        _pair(values.get("kernel", "0x0")),
        _pair(values["stride"]),
        _pair(values["pad"]),
        _pair(values["upsample"]),
        values["activation"],
        float(values.get("slope", 0.0)),
        int(values["weight"]),
        int(values["bias"]),
        norm,
        float(values.get("eps", 0.0)),
    )


def _values(line: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in line.split()[1:])


def _shape(text: str) -> Shape:
    c, h, w = map(int, text.split("x"))
    return c, h, w


def _pair(text: str) -> Pair:
    vertical, horizontal = map(int, text.split("x"))
    return vertical, horizontal


def _joined(values: Sequence[int]) -> str:
    return "x".join(map(str, values))


def _resolve(generator: nn.Module, name: str) -> Any:
    value: Any = generator
    for part in name.split("."):
        value = getattr(value, part)
    return value
