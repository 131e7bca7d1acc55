"""The chain of layers while it grows: which step adds a layer, and which one changes the last layer.

Two shapes are kept apart: that of torch's tensors, and the physical one, in which the kernels hold the same elements.
Reshapes change the first alone; the second follows when a layer needs positions (`Chain.lay_out`).
"""

from __future__ import annotations

from dataclasses import replace

from .layers import Layer, Pair, Plan, Shape

Norm = tuple[int, int, int, int]


class Chain:
    """A plan under construction.

    Attributes:
        layers: what there is so far.
        shape: the physical shape of the last layer's output.
        parameters: dotted names of the tensors that layers refer to.
    """

    def __init__(self, latent_size: int) -> None:
        self.layers: list[Layer] = []
        self.shape: Shape = (latent_size, 1, 1)
        self.parameters: list[str] = []

    def plan(self, image_shape: Shape) -> Plan:
        """Returns the plan of what was added."""
        return Plan(tuple(self.layers), image_shape, tuple(self.parameters))

    def index(self, owner: str, attribute: str, value: object) -> int:
        """Returns the index of a module's parameter or buffer, -1 where its value is None."""
        if value is None:
            return -1
        name = f"{owner}.{attribute}"
        if name not in self.parameters:
            self.parameters.append(name)
        return self.parameters.index(name)

    def append(self, layer: Layer) -> None:
        """Adds a layer at the end."""
        self.layers.append(layer)
        self.shape = layer.shape_out

    def lay_out(self, wanted: Shape) -> None:
        """Makes the physical shape that of a map, by the linear layer before it where there is one."""
        if self.shape == wanted:
            return
        first = len(self.layers)
        while first > 0 and self.layers[first - 1].is_elementwise:
            first -= 1
        # A norm per channel of an earlier shape holds that shape; then the elements are moved instead.
        bound = any(
            layer.norm is not None and layer.shape_out[1:] != (1, 1) for layer in self.layers[first - 1 :]
        )
        if first > 0 and self.layers[first - 1].kind == "linear" and not bound:
            self.layers[first - 1] = replace(self.layers[first - 1], shape_out=wanted)
            for i in range(first, len(self.layers)):
                self.layers[i] = replace(self.layers[i], shape_in=wanted, shape_out=wanted)
            self.shape = wanted
        else:
            self.append(Layer("reorder", self.shape, wanted))

    def normalise(self, norm: Norm, eps: float, per_element: bool) -> None:
        """Adds a BatchNorm: right after a matrix it folds into it, elsewhere it is an affine layer of its own.

        Folding it forward into a padded convolution would be wrong at the borders. `per_element` says that it has
        statistics for each element of what the kernels may hold in space; only a linear layer can take that.
        """
        before = self.layers[-1] if self.layers else None
        foldable = (
            before is not None
            and before.has_matrix
            and before.norm is None
            and before.activation == "identity"
        )
        spatial = per_element and self.shape[1:] != (1, 1)
        if before is not None and foldable and not (spatial and before.kind != "linear"):
            self.layers[-1] = replace(before, norm=norm, eps=eps)
        else:
            self.append(Layer("map", self.shape, self.shape, norm=norm, eps=eps))

    def activate(self, activation: str, slope: float) -> None:
        """Gives the last layer an activation, or adds a layer where the last one has one or cannot take one."""
        if not self.layers or self.layers[-1].activation != "identity" or self.layers[-1].kind == "reorder":
            self.append(Layer("map", self.shape, self.shape))
        self.layers[-1] = replace(self.layers[-1], activation=activation, slope=slope)

    def take_upsampling(self) -> Pair:
        """Removes a pure upsampling at the end, for the convolution that takes it over, and returns its factors."""
        if not self.layers:
            return 1, 1
        last = self.layers[-1]
        pure = last.kind == "map" and last.norm is None and last.activation == "identity"
        if not pure or last.pad != (0, 0) or last.upsample == (1, 1):
            return 1, 1
        self.layers.pop()
        self.shape = last.shape_in
        return last.upsample

    def crop(self, top: int, left: int, shape: Shape) -> None:
        """Cuts the output down: a convolution before it computes less, elsewhere a layer selects."""
        if shape == self.shape:
            return
        last = self.layers[-1] if self.layers else None
        positional = last is not None and last.kind in ("conv", "conv_transpose", "map")
        if last is None or not positional or last.is_elementwise:
            self.append(Layer("map", self.shape, shape, pad=(top, left)))
            return
        vertical, horizontal = last.pad
        if last.kind == "conv":  # input = stride * (output + start) + tap - pad
            pad = (vertical - last.stride[0] * top, horizontal - last.stride[1] * left)
        else:
            pad = (vertical + top, horizontal + left)
        self.layers[-1] = replace(last, shape_out=shape, pad=pad)
        self.shape = shape
