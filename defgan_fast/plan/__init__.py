"""A generator as a plan: a chain of layers that the kernels can run without knowing torch.

layers.py           what a plan is made of, and its text, which travels to the kernels (`csrc/plan.h` reads it)
activations.py      every activation: its name, its function, the torch modules and functions that mean it
interpretation.py   a plan in plain, differentiable PyTorch
tracing.py          from an `nn.Module` to a plan: the walk along its graph, and the check of what came out
torch_layers.py     what each kind of torch layer adds to the chain
chain.py            the chain while it grows
latents.py          which latents a generator takes
structure.py        what of a generator a plan depends on beside its weights

A new activation is a row of `activations.ACTIVATIONS`. A new kind of layer is a field or a kind of `layers.Layer`, a
function of `interpretation.KINDS` and a handler of `torch_layers.MODULES` or `FUNCTIONS`. Both need `csrc/plan.h`
beside it.
"""

from .interpretation import interpret
from .latents import decoder_of, latent_size_of, takes_maps
from .layers import Layer, LoweringError, Plan
from .structure import structure_of, tensors_of
from .tracing import lower

__all__ = [
    "Layer",
    "LoweringError",
    "Plan",
    "decoder_of",
    "interpret",
    "latent_size_of",
    "lower",
    "structure_of",
    "takes_maps",
    "tensors_of",
]
