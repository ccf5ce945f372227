"""The order of `--help`: options under the question that they answer, what is asked first on top.

A field belongs to the first group that has a pattern for it."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterator
from typing import Any

# Patterns of names, under titles in the order in which they are shown.
GROUPS: dict[str, tuple[str, ...]] = {
    "what to make": (
        "prompt", "negative_prompt", "image", "mask", "strength", "size", "width",
        "height", "num_frames", "fps", "num_outputs", "seed",
    ),
    "how to make it": (
        "num_inference_steps", "guidance_scale*", "true_cfg_scale", "flow_shift",
        "max_sequence_length",
    ),
    "where it goes": ("output_path", "output_compression"),
    "the model": (
        "model_path", "model_name", "served_model_name", "revision", "variant",
        "transformer*_path", "backend",
    ),
    "the server": ("host", "port", "public_base_url", "data_dir", "log_level", "metadata"),
    "devices, precision and speed": (
        "device", "num_gpus", "*_degree", "cfg_parallel_size", "dp_size", "*_offload",
        "pin_cpu_memory", "*_precision", "attention_backend", "memory_budget", "max_batch_rows",
        "max_running_jobs",
    ),
    "adapters (LoRA)": ("lora_*", "max_lora_memory", "allowed_lora_path"),
    "keys and access": (
        "*_key_file", "insecure_no_auth", "public_metrics", "allowed_hosts", "cors_origins",
    ),
    "pictures that requests name": ("media_urls", "allow_media_host", "allowed_media_path"),
    "queues, time and disk": (
        "max_queue*", "max_*_per_key", "request_timeout", "video_timeout", "worker_timeout",
        "drain_timeout", "retention_hours", "max_disk_gb", "min_free_gb",
    ),
    "several servers with one job table": ("database_url", "node_name"),
    "a copy of the results in S3": ("s3_*",),
    "limits of a request": ("max_*", "*_timeout", "keep_alive", "lenient", "log_prompts"),
    "further options": ("*",),
}  # fmt: skip


def grouped(kind: type[Any]) -> Iterator[tuple[str, list[dataclasses.Field[Any]]]]:
    """Titles and the fields of dataclass `kind` under them; each field once."""
    left = {field.name: field for field in dataclasses.fields(kind)}
    for title, patterns in GROUPS.items():
        names = [name for pattern in patterns for name in fnmatch.filter(left, pattern)]
        if names:
            yield title, [left.pop(name) for name in dict.fromkeys(names)]
