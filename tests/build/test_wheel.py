"""The build: a wheel with the native library, one without, and what happens without a compiler.

Built from a copy of the tree, without CUDA kernels to save time; the library that the other tests
load was built with them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = (
    *("CMakeLists.txt", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"),
    *("csrc", "kernels", "sgl_diffusion"),
)
LIBRARY = "sgl_diffusion/_lib/libsgld.so"


def _wheel(tree: Path, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps"]
    return subprocess.run(
        [*command, "--no-index", "-w", str(out), str(tree)],
        env=os.environ | {"CMAKE_ARGS": "-DSGLD_CUDA=OFF", "SGLD_SKIP_EXT": ""} | environment,
        capture_output=True,
        text=True,
    )


def _names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            ignore = shutil.ignore_patterns("_lib", "__pycache__")
            shutil.copytree(source, tree / name, ignore=ignore)
        else:
            shutil.copy2(source, tree / name)
    return tree


@pytest.fixture(scope="module")
def native_wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler")
    out = tmp_path_factory.mktemp("native")
    done = _wheel(tree, out)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.iterdir()
    return wheel


@pytest.mark.slow
def test_the_native_wheel_fits_every_python(native_wheel: Path) -> None:
    assert re.fullmatch(r"sgl_diffusion-[\d.]+-py3-none-linux_\w+\.whl", native_wheel.name)
    names = _names(native_wheel)
    assert LIBRARY in names
    assert "sgl_diffusion/kernels/norm.py" in names, "kernels/triton is installed as a package"
    assert "sgl_diffusion/ops/dispatch.py" in names
    assert "sgl_diffusion/demo/transformer/diffusion_pytorch_model.safetensors" in names
    assert "sgl_diffusion/demo/adapters/night.safetensors" in names
    foreign = {name.split("/")[0] for name in names} - {"sgl_diffusion"}
    assert all(name.endswith(".dist-info") for name in foreign), foreign


@pytest.mark.slow
def test_the_library_needs_no_python_openmp_or_cuda_runtime(
    native_wheel: Path, tmp_path: Path
) -> None:
    with zipfile.ZipFile(native_wheel) as archive:
        file = archive.extract(LIBRARY, tmp_path)
    listing = subprocess.run(["readelf", "-d", file], capture_output=True, text=True, check=True)
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", listing.stdout)
    assert "libtorch_cpu.so" in needed
    assert not [name for name in needed if re.search(r"python|gomp|iomp|cudart|libcuda", name)]
    assert "RUNPATH" not in listing.stdout and "RPATH" not in listing.stdout


@pytest.mark.slow
def test_the_wheel_library_runs(native_wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(native_wheel) as archive:
        file = archive.extract(LIBRARY, tmp_path)
    code = (
        "import torch; from sgl_diffusion import ops\n"
        "ops.norm_modulate(torch.randn(2, 8)); print(ops.counts(), torch.ops.sgld.has_cuda())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"SGLD_LIBRARY": file},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "{('norm_modulate', 'cpu'): 1} False", done.stderr


@pytest.mark.slow
def test_the_cpp_selftest_passes(native_wheel: Path, tree: Path) -> None:
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    ctest = shutil.which("ctest", path=path)
    assert ctest is not None
    done = subprocess.run(
        [ctest, "--test-dir", tree / "build" / "native", "--output-on-failure"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "100% tests passed" in done.stdout, done.stdout
    assert (tree / "build" / "native" / "compile_commands.json").exists()


@pytest.mark.slow
def test_a_second_build_compiles_nothing(native_wheel: Path, tree: Path, tmp_path: Path) -> None:
    objects = {path: path.stat().st_mtime_ns for path in (tree / "build").rglob("*.o")}
    assert objects
    (tree / "sgl_diffusion" / "left_over.py").write_text("")
    assert _wheel(tree, tmp_path / "one").returncode == 0
    (tree / "sgl_diffusion" / "left_over.py").unlink()
    assert _wheel(tree, tmp_path / "two").returncode == 0
    assert objects == {path: path.stat().st_mtime_ns for path in (tree / "build").rglob("*.o")}
    first, second = (_names(next((tmp_path / out).iterdir())) for out in ("one", "two"))
    assert set(first) - set(second) == {"sgl_diffusion/left_over.py"}, "a removed file stayed"


def test_the_pure_wheel(tree: Path, tmp_path: Path) -> None:
    """Also after a native build in the same tree, whose library must not slip in."""
    done = _wheel(tree, tmp_path, SGLD_SKIP_EXT="1", PATH=os.defpath, CXX="missing-compiler")
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    names = _names(wheel)
    assert "sgl_diffusion/kernels/norm.py" in names
    assert not [name for name in names if name.endswith(".so")]


@pytest.mark.parametrize("cxx", ["", "missing-compiler"])
def test_without_a_compiler_the_message_says_what_to_do(
    cxx: str, tree: Path, tmp_path: Path
) -> None:
    done = _wheel(tree, tmp_path / "out", PATH=str(tmp_path), CXX=cxx)
    text = done.stdout + done.stderr
    assert done.returncode != 0
    assert "sgl_diffusion: the native library needs a C++20 compiler, and there is no " in text
    assert (cxx or "c++ or g++ or clang++") in text
    assert "set SGLD_SKIP_EXT=1 to install without native kernels" in text
    assert "Traceback" not in text
