"""The version of the package, in one place.

`pyproject.toml` reads this literal without importing the package, and the compiled extension's build folder
is keyed by it, so it must stay importable without torch.
"""

__version__ = "0.1.0"
