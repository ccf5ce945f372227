"""Weights into a module: ours against safetensors' load_file, and against the disk.

    python benchmarks/bench_load.py [--gigabytes 1.25] [--repeats 7] [--folder DIR] [--save]

cold     the file is not in the page cache. Limit: what threads read past the cache, without keeping
         it. Bar: 0.9 of it.
warm     it is. Afterwards a word of every page is read: who only maps a file has read nothing yet.
         Peers: load_file with a copy into the module, and with reads (pread). Bar: 1.3 times the
         faster. Ours maps; "copied" is without that. Shown beside them: load_file, which maps, and
         its tensors made the module's, the least that can be done.
convert  bf16 in the file, fp32 in the module, warm, against load_file and a copy.

Ways take turns; medians are compared. The folder is to be on the disk that models are on.
"""

from __future__ import annotations

import argparse
import itertools
import mmap
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.harness import Busy, finish, machine
from sgl_diffusion.base import native
from sgl_diffusion.loader.weights import load_weights

BARS = {"cold": 0.9, "warm": 1.3}
WIDTH, HIDDEN = 1536, 8960  # of Wan 1.3B
CHUNK = 4 << 20
THREADS = 8


class Layers(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, HIDDEN) for _ in range(count))


def empty(count: int) -> nn.Module:
    with torch.device("meta"):
        return Layers(count)


def write(file: Path, count: int) -> None:
    block = torch.randn(1 << 20).bfloat16()
    module = empty(count).bfloat16().to_empty(device="cpu")
    for parameter in module.parameters():
        for part in parameter.data.view(-1).split(len(block)):
            part.copy_(block[: len(part)])
    save_file(module.state_dict(), file)
    os.sync()


def forget(file: Path) -> None:
    with file.open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def past_the_cache(file: Path) -> None:
    """All of the file by a few threads, each over the same memory again and again."""
    descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
    places = iter(range(0, file.stat().st_size, CHUNK))
    lock = threading.Lock()

    def work() -> None:
        memory = mmap.mmap(-1, CHUNK)
        while True:
            with lock:
                place = next(places, None)
            if place is None:
                return
            os.preadv(descriptor, [memory], place)

    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.close(descriptor)


def ways(file: Path, count: int) -> dict[str, tuple[bool, Callable[[], Any]]]:
    """By name: whether the file is in the cache, and what is timed."""

    def ours(dtype: torch.dtype) -> nn.Module:
        module = empty(count)
        load_weights(module, file, dtype=dtype)
        return module

    def copied(dtype: torch.dtype) -> nn.Module:
        module = empty(count).to(dtype).to_empty(device="cpu")
        module.load_state_dict(load_file(file))
        return module

    def assigned() -> nn.Module:
        module = empty(count)
        module.load_state_dict(load_file(file), assign=True)
        return module

    def touched(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for value in state.values():
            value.view(-1).view(torch.int64)[::512].sum()
        return state

    def without_maps() -> nn.Module:
        os.environ["SGLD_MAP_WEIGHTS"] = "0"
        try:
            return ours(half)
        finally:
            del os.environ["SGLD_MAP_WEIGHTS"]

    half, full = torch.bfloat16, torch.float32
    return {
        "cold limit": (False, lambda: past_the_cache(file)),
        "cold ours": (False, lambda: ours(half)),
        "cold load_file + copy": (False, lambda: copied(half)),
        "warm ours": (True, lambda: touched(ours(half).state_dict())),
        "warm ours, copied": (True, lambda: touched(without_maps().state_dict())),
        "warm load_file, assigned": (True, lambda: touched(assigned().state_dict())),
        "warm load_file + copy": (True, lambda: touched(copied(half).state_dict())),
        "warm load_file pread": (True, lambda: touched(load_file(file, backend="pread"))),
        "convert ours": (True, lambda: ours(full)),
        "convert load_file + copy": (True, lambda: copied(full)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.25)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    if reason := native.absent():
        raise SystemExit(reason)
    count = max(round(options.gigabytes * 1e9 / (2 * HIDDEN * (WIDTH + 1))), 1)
    seconds: dict[str, list[float]] = {}
    busy = Busy()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        file = Path(folder) / "weights.safetensors"
        write(file, count)
        size = file.stat().st_size
        # The first turn is for what libraries and the system do once.
        for turn, (name, (cached, way)) in itertools.product(
            range(options.repeats + 1), ways(file, count).items()
        ):
            file.read_bytes() if cached else forget(file)
            begin = time.perf_counter()
            kept = way()
            taken = time.perf_counter() - begin
            del kept
            if turn:
                seconds.setdefault(name, []).append(taken)
    rates = {name: size / statistics.median(all_) / 1e9 for name, all_ in seconds.items()}
    for name, rate in rates.items():
        print(f"{name:<32} {rate:8.2f} GB/s")
    peer = max(rates["warm load_file + copy"], rates["warm load_file pread"])
    reached = {
        "cold": rates["cold ours"] / rates["cold limit"],
        "warm": rates["warm ours"] / peer,
    }
    for name, value in reached.items():
        print(
            f"{name}: {value:.2f}, bar {BARS[name]}: {'met' if value >= BARS[name] else 'missed'}"
        )
    record = {
        "benchmark": "load",
        "machine": machine(),
        "bytes": size,
        "busy_cores": busy.cores(),
        "gigabytes_per_second": {name: round(rate, 3) for name, rate in rates.items()},
        "reached": {name: round(value, 3) for name, value in reached.items()},
        "bars": BARS,
    }
    finish(record, options.save)


if __name__ == "__main__":
    main()
