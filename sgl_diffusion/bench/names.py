"""What can be measured: the ops, and the sizes that make up a shape of each. Without torch."""

from __future__ import annotations

# A shape on the command line is these sizes with an x between them.
SIZES: dict[str, tuple[str, ...]] = {
    "attention": ("queries", "keys", "heads", "head_dim"),
    "attention_merge": ("tokens", "heads", "head_dim"),
    "norm_modulate": ("tokens", "width"),
    "gate_residual": ("tokens", "width"),
    "gate_residual_norm_modulate": ("tokens", "width"),
    "qk_norm_rope": ("tokens", "heads", "head_dim"),
    "gelu_tanh": ("tokens", "width"),
    "silu_mul": ("tokens", "width"),
    "cfg_combine_step": ("channels", "frames", "height", "width"),
    "quant_fp8_rowwise": ("tokens", "width"),
    "lora_merge_": ("out", "in", "rank"),
    "lora_unmerge_": ("out", "in", "rank"),
    "lora_apply": ("tokens", "in", "out", "rank"),
    "linear": ("tokens", "in", "out"),
}
DTYPES = {"bf16": "bfloat16", "fp32": "float32", "fp16": "float16"}
DEVICES = ("cpu", "cuda")
