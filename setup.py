"""Builds the native library through CMake; everything else is in pyproject.toml.

    pip install .                   CPU kernels, and CUDA kernels when nvcc is found (no GPU needed)
    SGLD_SKIP_EXT=1 pip install .   no compiler: pure Python, every op runs as its torch truth
    CMAKE_ARGS=-DSGLD_CUDA=OFF ...  options for CMake, for example no CUDA kernels

The result is one shared library against PyTorch's stable ABI: the wheel fits every Python 3.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

from setuptools import Command, Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
LIBRARY = Path("sgl_diffusion", "_lib", "libsgld.so")
SKIP = os.environ.get("SGLD_SKIP_EXT", "") not in ("", "0")
COMPILERS = ("c++", "g++", "clang++")
PURE = "set SGLD_SKIP_EXT=1 to install without native kernels"


def stop(what: str, next_step: str) -> NoReturn:
    """End the build with two lines instead of a traceback."""
    sys.stderr.write(f"\nsgl_diffusion: {what}\n  {next_step}\n")
    raise SystemExit(1)


def tool(name: str) -> str:
    """A build tool from beside the interpreter; a system's own may be too old for its nvcc."""
    places = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    found = shutil.which(name, path=places)
    if found is None:
        stop(f"the native library needs {name}.", f"Run `pip install {name}`, or {PURE}.")
    return found


def torch_dir() -> Path:
    """The folder of the torch package, found without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        stop(
            "the native library is built against torch, which is not installed here.",
            "Leave out --no-build-isolation, or run `pip install torch` first.",
        )
    return Path(spec.origin).parent


def check_compiler() -> None:
    names = os.environ.get("CXX", "").split()[:1] or COMPILERS
    if not any(map(shutil.which, names)):
        stop(
            f"the native library needs a C++20 compiler, and there is no {' or '.join(names)}.",
            f"Install one (Debian, Ubuntu: `apt install g++`), or {PURE}.",
        )


def run(*command: str | Path) -> None:
    result = subprocess.run(command, cwd=ROOT)
    if result.returncode:
        name = Path(command[0]).name
        stop(
            f"{name} could not build the native library (messages above).",
            f"Correct what it names, or {PURE}.",
        )


class BuildNative(Command):
    """CMake and ninja; the CMake folder stays, so a second build compiles only what changed."""

    description = "build the native library"
    user_options: list[tuple[str, str | None, str]] = []
    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib: str | None = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self) -> None:
        check_compiler()
        cmake, ninja, torch = tool("cmake"), tool("ninja"), torch_dir()
        folder = ROOT / "build" / "native"
        # A folder that was set up with tools of a removed environment cannot be used again.
        settings, stamp = f"{cmake}\n{ninja}\n", folder / "tools.txt"
        fresh = () if stamp.exists() and stamp.read_text() == settings else ("--fresh",)
        options = [f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DSGLD_TORCH_DIR={torch}"]
        options += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        run(cmake, *fresh, "-S", ROOT, "-B", folder, "-G", "Ninja", *options)
        stamp.write_text(settings)
        run(cmake, "--build", folder)
        target = self.target()
        target.parent.mkdir(parents=True, exist_ok=True)
        # Renamed into place: a running process keeps the old file, whole.
        temporary = target.with_suffix(".new")
        shutil.copy2(folder / LIBRARY.name, temporary)
        temporary.replace(target)

    def target(self) -> Path:
        return (ROOT if self.editable_mode else Path(str(self.build_lib))) / LIBRARY


class BuildPython(build_py):
    """A wheel holds what is in the tree now, not what an earlier build left behind."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class Build(build):
    sub_commands = [*build.sub_commands, ("build_native", lambda self: not SKIP)]


class Wheel(bdist_wheel):
    """The library needs this platform, but no particular Python."""

    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()
        return tag if SKIP else ("py3", "none", tag[2])


class Native(Distribution):
    def has_ext_modules(self) -> bool:
        return not SKIP


setup(
    distclass=Native,
    packages=[*find_packages(include=["sgl_diffusion*"]), "sgl_diffusion.kernels"],
    package_dir={"sgl_diffusion.kernels": "kernels/triton"},
    cmdclass={
        "build": Build,
        "build_native": BuildNative,
        "build_py": BuildPython,
        "bdist_wheel": Wheel,
    },
)
