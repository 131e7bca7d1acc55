"""The compiled kernels as Python sees them; the sources are in `csrc/`.

build.py       what the extension is made of: sources, flags, whether CUDA takes part (read by setup.py, too)
extension.py   finds the extension that was built with the package, or compiles it on first import
ops.py         the compiled operators with their arguments explained, and which devices they run on
"""
