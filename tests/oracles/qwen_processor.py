"""What Qwen2VLProcessor does for diffusers, without torchvision, which its own class asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class Processor:
    """Pictures are prepared, and their places in the text filled up, one token for four patches."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoTokenizer
        from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as preparation

        self.tokenizer = AutoTokenizer.from_pretrained(path / "tokenizer")
        self.image_processor = preparation.Qwen2VLImageProcessorPil.from_pretrained(
            path / "processor"
        )

    def __call__(self, text: Any, images: Any, padding: bool, return_tensors: str) -> Any:
        prepared = self.image_processor(images=images, return_tensors=return_tensors)
        counts = iter([int(grid.prod()) // 4 for grid in prepared["image_grid_thw"]])
        filled = []
        for one in [text] if isinstance(text, str) else text:
            while "<|image_pad|>" in one:
                one = one.replace("<|image_pad|>", "<|place|>" * next(counts), 1)
            filled.append(one.replace("<|place|>", "<|image_pad|>"))
        tokens = self.tokenizer(filled, padding=padding, return_tensors=return_tensors)
        prepared.update(tokens)
        return prepared
