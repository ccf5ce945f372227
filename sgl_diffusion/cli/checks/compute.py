"""What the probe found, judged: torch, GPUs, kernels, codecs, memory, threads."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

from sgl_diffusion.base.config import ServeOptions
from sgl_diffusion.base.device import DRIVER_FILE, nvidia_driver
from sgl_diffusion.base.omni import OmniServeOptions
from sgl_diffusion.cli.checks.probe import Facts, Probed
from sgl_diffusion.cli.checks.types import Check, failed, ok, warning

_LEAST_TORCH = (2, 11)
_LITTLE_MEMORY = 2 * 2**30
_OTHER_FILES = 256  # beside connections: libraries, the job table, results
_BUILD = "Build it: pip install --no-build-isolation --force-reinstall --no-deps ."


def checks(probed: Probed, options: ServeOptions | OmniServeOptions) -> Iterator[Check]:
    yield torch(probed)
    yield gpu(probed, options.device)
    yield native(probed)
    yield triton(probed)
    yield codecs(probed)
    yield memory(probed)
    yield threads(probed)
    yield open_files(resource.getrlimit(resource.RLIMIT_NOFILE), options.max_connections)


def torch(probed: Probed) -> Check:
    if "No module named 'torch'" in probed.broken.get("torch", ""):
        least = ".".join(map(str, _LEAST_TORCH))
        return failed("torch", "it is not installed", f"pip install 'torch>={least}'")
    if "torch" in probed.broken:
        fix = "pip install --force-reinstall torch"
        return failed("torch", f"it cannot be loaded: {probed.broken['torch']}", fix)
    if "torch" not in probed.facts:
        return failed("torch", "Python itself could not start", "Run: python -c pass")
    facts = probed.facts["torch"]
    version = tuple(int(part) for part in facts["version"].split(".")[:2])
    if version < _LEAST_TORCH:
        least = ".".join(map(str, _LEAST_TORCH))
        return failed("torch", facts["version"], f"pip install --upgrade 'torch>={least}'")
    cuda = f"for CUDA {facts['cuda']}" if facts["cuda"] else "for CPUs only"
    return ok("torch", f"{facts['version']}, {cuda}")


def gpu(probed: Probed, device: str, driver_file: Path = DRIVER_FILE) -> Check:
    """A GPU that is there and cannot be used, or is asked for and not there."""
    facts = probed.facts.get("torch", {"cuda": None, "gpus": []})
    if facts["gpus"]:
        return _gpus(facts["gpus"])
    driver = nvidia_driver(driver_file)
    if driver is None:
        found = "no NVIDIA driver"
        if device == "cuda":
            return failed("gpu", f"{found}, but --device cuda", "Use --device cpu or auto.")
        return ok("gpu", f"{found}: models run on the CPU")
    if facts["cuda"] is None:
        found, fix = "this torch is for CPUs only", "pip install --force-reinstall torch"
    else:
        found = f"torch for CUDA {facts['cuda']} finds no GPU"
        fix = "Update the driver to one for that CUDA, or install a torch for an older CUDA."
    make = failed if device == "cuda" else warning
    return make("gpu", f"driver {driver}, but {found}", fix)


def _gpus(found: list[Facts]) -> Check:
    names = [
        f"{one['name']} (sm_{''.join(map(str, one['capability']))}, "
        f"{one['free'] / 2**30:.1f} of {one['total'] / 2**30:.1f} GiB free)"
        for one in found
    ]
    if any(tuple(one["capability"]) < (8, 0) for one in found):
        fix = "Nothing to do: it runs in fp16, as bf16 needs a GPU from sm_80 on."
        return warning("gpu", ", ".join(names), fix)
    return ok("gpu", ", ".join(names))


def native(probed: Probed) -> Check:
    if "torch" not in probed.facts:
        return warning("native library", "not tried, as torch does not load", "Mend torch first.")
    if "native" in probed.broken:
        reason = probed.broken["native"]
        return failed("native library", reason, f"{_BUILD} Or unset SGLD_LIBRARY.")
    facts = probed.facts["native"]
    if facts["absent"]:
        make = failed if facts["exists"] else warning
        slow = "" if facts["exists"] else "; PyTorch does all the work, slower"
        return make("native library", facts["absent"] + slow, _BUILD)
    kind = "with CUDA kernels" if facts["cuda"] else "without CUDA kernels"
    found = f"CPU kernels {facts['isa']}, {kind} ({facts['path']})"
    if not facts["cuda"] and probed.facts["torch"]["gpus"]:
        return warning("native library", found, "Build it again where nvcc is found.")
    return ok("native library", found)


def triton(probed: Probed) -> Check:
    if "triton" in probed.broken:
        return warning("triton", probed.broken["triton"], "pip install --force-reinstall triton")
    version = probed.facts.get("triton", {"version": None})["version"]
    if version is None and probed.facts.get("torch", {}).get("gpus"):
        return warning("triton", "not installed", "pip install 'sgl-diffusion[triton]'")
    return ok("triton", version or "not installed, and no GPU that could use it")


def codecs(probed: Probed) -> Check:
    fix = "pip install --force-reinstall av"
    if "codecs" not in probed.facts:
        return failed("codecs", f"PyAV: {probed.broken.get('codecs', 'not tried')}", fix)
    facts = probed.facts["codecs"]
    if not facts["video"]:
        return failed("codecs", f"PyAV {facts['version']} has no H.264 encoder", fix)
    if facts["silent"]:
        found = f"PyAV {facts['version']} cannot make {', '.join(facts['silent'])}"
        return warning("codecs", found, fix)
    return ok("codecs", f"PyAV {facts['version']}: H.264 and every kind of sound")


def memory(probed: Probed) -> Check:
    free = probed.facts["memory"]["free"] if "memory" in probed.facts else None
    if free is None:
        return ok("memory", "the system does not tell what is free")
    found = f"{free / 2**30:.1f} GiB free"
    if free < _LITTLE_MEMORY:
        return warning("memory", found, "End other programs, or raise the limit of the container.")
    return ok("memory", found)


def threads(probed: Probed) -> Check:
    """Two OpenMP runtimes in one process keep two sets of threads, which take turns in waiting."""
    if "threads" not in probed.facts:
        return ok("threads", "the system does not tell which libraries are loaded")
    files = probed.facts["threads"]["files"]
    if len(files) > 1:
        fix = "Keep one: unset LD_PRELOAD, and install numpy and torch from the same source."
        return warning("threads", f"{len(files)} OpenMP libraries: {', '.join(files)}", fix)
    return ok("threads", f"one OpenMP library: {files[0]}" if files else "no OpenMP library")


def open_files(limits: tuple[int, int], connections: int) -> Check:
    soft, hard = limits
    needed = connections + _OTHER_FILES
    found = "no limit" if soft == resource.RLIM_INFINITY else f"at most {soft}"
    if soft != resource.RLIM_INFINITY and soft < needed:
        fix = f"ulimit -n {needed}, or fewer --max-connections."
        return warning("open files", f"{found}, too few for {connections} connections", fix)
    return ok("open files", found)
