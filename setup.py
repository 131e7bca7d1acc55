"""Builds the extension ahead of time where torch is visible, and ships its sources everywhere.

With `pip install --no-build-isolation .` torch is visible and the extension is compiled now. In pip's
isolated build environment it is not: asking for it there would fetch another torch than the one installed
and break the binary interface, so only the sources are installed, and compiled on first import. Everything
that is not a build step is metadata in pyproject.toml.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"


def load_build_settings():
    """Loads `defgan_fast/kernels/build.py` by its path: importing the package would import torch."""
    path = ROOT / "defgan_fast" / "kernels" / "build.py"
    spec = importlib.util.spec_from_file_location("defgan_fast_build", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


settings = load_build_settings()


class BuildPy(build_py):
    """Copies `csrc/` into the package as `_csrc/`: an installed package can then compile on first import."""

    def run(self):
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "defgan_fast" / "_csrc"
        shutil.rmtree(target, ignore_errors=True)  # a file deleted from csrc/ must not survive in build/
        for source in settings.shipped_files(CSRC):
            copy = target / source.relative_to(CSRC)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)


def extension_arguments():
    """Returns `ext_modules` and `cmdclass` for setup(): with the extension if torch can be imported, else without."""
    commands = {"build_py": BuildPy}
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        print(f"defgan_fast: torch is not visible ({error}): the kernels are compiled on first import")
        return {"cmdclass": commands}
    compiler = settings.compiler()
    if shutil.which(compiler) is None:
        print(f"defgan_fast: no C++ compiler ('{compiler}' was not found): only the sources are installed")
        return {"cmdclass": commands}
    os.environ["PATH"] = settings.path_with_ninja()
    if not os.environ.get("CXX", "").strip():
        os.environ.pop("CXX", None)  # torch and setuptools stumble over one that is empty

    decision = settings.decide_cuda(CSRC, torch.__version__, torch.version.cuda)
    print(f"defgan_fast: {'with' if decision.use else 'without'} CUDA kernels: {decision.reason}")
    if decision.use:
        cpp_extension.CUDA_HOME = decision.home
        os.environ["TORCH_CUDA_ARCH_LIST"] = decision.architectures
        print(f"defgan_fast: for the architectures {decision.architectures} (TORCH_CUDA_ARCH_LIST)")

    class BuildExt(cpp_extension.BuildExtension):
        """Keeps the objects of editable builds, and records which torch the extension was built for."""

        def finalize_options(self):
            super().finalize_options()
            if self.inplace or self.editable_mode:
                # setuptools would take a temporary folder and compile all of it at every `pip install -e .`.
                tag = f"py{sys.version_info.major}{sys.version_info.minor}-{platform.machine()}"
                self.build_temp = str(ROOT / "build" / f"objects-{tag}-torch{torch.__version__}")

        def run(self):
            super().run()
            for extension in self.extensions:
                library = Path(self.get_ext_fullpath(extension.name))
                record = json.dumps(decision.record(torch.__version__)) + "\n"
                (library.parent / settings.BUILD_RECORD).write_text(record)

    kind = cpp_extension.CUDAExtension if decision.use else cpp_extension.CppExtension
    extension = kind(
        name="defgan_fast._C",
        # setuptools wants paths relative to setup.py
        sources=[str(path.relative_to(ROOT)) for path in settings.source_files(CSRC, decision.use)],
        include_dirs=[str(CSRC)],
        extra_compile_args={"cxx": settings.compile_flags(decision.use), "nvcc": settings.NVCC_FLAGS},
        extra_link_args=settings.LINK_FLAGS,
    )
    return {"ext_modules": [extension], "cmdclass": commands | {"build_ext": BuildExt}}


setup(license="Apache-2.0", **extension_arguments())
