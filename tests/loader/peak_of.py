"""Load one component in a process of its own and print what it took: run by test_peak.py.

For a transformer the peak is that of all resident memory, pages of mapped files included. Text
encoders are read by their library, which keeps a file mapped while it converts it: those pages the
kernel takes back when it needs them, so for them the memory of the process's own counts.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import torch


def resident(field: str) -> int:
    """Bytes, from the kernel: VmRSS is now, VmHWM the most so far, RssAnon now without files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


class Watch:
    """The most of the process's own memory, looked at every few milliseconds."""

    def __init__(self) -> None:
        self._done = threading.Event()
        self.most = self.start = resident("RssAnon")
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def _look(self) -> None:
        while not self._done.wait(0.005):
            self.most = max(self.most, resident("RssAnon"))

    def stop(self) -> int:
        self._done.set()
        self._thread.join()
        return max(self.most, resident("RssAnon")) - self.start


def main(what: str, folder: Path, dtype: torch.dtype) -> None:
    # What libraries take when they first run is none of the weights.
    (torch.ones(64, 64, dtype=dtype) @ torch.ones(64, 64, dtype=dtype)).float().sum()
    if what == "transformer":
        from sgl_diffusion.loader.index import read_config
        from sgl_diffusion.loader.weights import load_weights
        from sgl_diffusion.models.flux import FluxParams, FluxTransformer
        from sgl_diffusion.models.flux_weights import RULES

        with torch.device("meta"):
            model = FluxTransformer(FluxParams.from_config(read_config(folder)))
        before = resident("VmRSS")
        load_weights(model, folder, RULES, dtype=dtype)
        peak = resident("VmHWM") - before
    else:
        from transformers import T5EncoderModel

        from sgl_diffusion.components.pretrained import load_pretrained
        from sgl_diffusion.loader.index import Component

        watch = Watch()
        part = Component(folder, "transformers", "T5EncoderModel")
        model = load_pretrained(T5EncoderModel, part, dtype=dtype, device=torch.device("cpu"))
        peak = watch.stop()
    size = sum(parameter.nbytes for parameter in model.parameters())
    print(json.dumps({"size": size, "peak": peak}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), getattr(torch, sys.argv[3]))
