"""What the GPU check measures: the shapes of FLUX.1, Wan 1.3B and 14B, Qwen-Image and Z-Image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu_check import SETS, Peers, Row, compare, copy_rate, rows_of
from sgl_diffusion import ops
from sgl_diffusion.ops import (
    cuda_attention,
    cuda_lora,
    cuda_norms,
    library,
    triton_attention,
    triton_elementwise,
    triton_lora,
)

ROWS = ((4608, 3072), (32760, 1536), (32760, 5120), (4096, 6144))
HEADS = ((4608, 24), (32760, 12), (32760, 40))
ATTENTION = (  # queries, keys, heads, head dim
    (4608, 4608, 24, 128),
    (4173, 4173, 30, 128),
    (16896, 16896, 24, 128),
    (32760, 32760, 12, 128),
    (75600, 75600, 12, 128),
    (32760, 512, 12, 128),
    (32760, 512, 40, 128),
    (4096, 4096, 24, 64),
    (16384, 16384, 24, 64),
)
WAN_1B = [(1536, 1536)] * 8 + [(8960, 1536), (1536, 8960)], 30
WAN_14B = [(5120, 5120)] * 8 + [(13824, 5120), (5120, 13824)], 40
EPS = 1e-6


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.float32).to(dtype)


def norms() -> list[Row]:
    """Rows G7 to G10: the fused norms, rotation and activations."""
    assert not library.absent(), library.absent()
    limit = copy_rate()
    rows: list[Row] = [{"op": "copy", "GB/s": limit}]
    for tokens, width in ROWS:
        rows += _norm_rows(tokens, width, limit)
    for tokens, heads in HEADS:
        rows += _rope_rows(tokens, heads, limit)
    for tokens, width in ((4608, 12288), (32760, 8960), (32760, 13824)):
        rows += _activation_rows(tokens, width, limit)
    return rows


def _norm_rows(tokens: int, width: int, limit: float) -> list[Row]:
    shape, gb = f"{tokens}x{width}", tokens * width * 2 / 1e9
    xs, ys = ([normal(1, tokens, width) for _ in range(SETS)] for _ in range(2))
    gate, scale, shift = normal(3, 1, 1, width, dtype=torch.float32)

    def norm(x: Tensor) -> Tensor:
        y = functional.layer_norm(x.float(), (width,), eps=EPS)
        return (y * (1 + scale) + shift).to(x.dtype)

    def gated(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x = (x.float() + y.float() * gate).to(x.dtype)
        return x, norm(x)

    compiled, compiled_gated = torch.compile(norm), torch.compile(gated)
    peers: Peers = {"eager": lambda i: norm(xs[i]), "compile": lambda i: compiled(xs[i])}
    for name in ("cuda", "triton"):
        call = ops.OPS.get("norm_modulate").implementation(name).run
        peers[name] = lambda i, call=call: call(
            xs[i], scale, shift, None, None, EPS, "layer", xs[i].dtype
        )
    rows = rows_of("norm_modulate", shape, peers, 2 * gb, "GB/s", limit)
    rest = (gate, scale, shift, None, None, EPS, "layer")
    peers = {
        "eager": lambda i: gated(xs[i], ys[i]),
        "compile": lambda i: compiled_gated(xs[i], ys[i]),
        "cuda": lambda i: cuda_norms.gate_residual_norm_modulate(xs[i], ys[i], *rest),
        "triton": lambda i: triton_elementwise.gate_residual_norm_modulate(xs[i], ys[i], *rest),
    }
    rows += rows_of("gate_residual_norm_modulate", shape, peers, 4 * gb, "GB/s", limit)
    update = torch.compile(lambda x, y: (x.float() + y.float() * gate).to(x.dtype))
    peers = {
        "eager": lambda i: xs[i] + ys[i] * gate.to(torch.bfloat16),
        "compile": lambda i: update(xs[i], ys[i]),
        "triton": lambda i: triton_elementwise.gate_residual(xs[i], ys[i], gate),
    }
    rows += rows_of("gate_residual", shape, peers, 3 * gb, "GB/s", limit)
    peers = {"triton": lambda i: triton_elementwise.quant_fp8_rowwise(xs[i])}
    return rows + rows_of("quant_fp8_rowwise", shape, peers, 1.5 * gb, "GB/s", limit)


def _rope_rows(tokens: int, heads: int, limit: float) -> list[Row]:
    dim = 128
    fused = [normal(1, tokens, 3, heads, dim) for _ in range(SETS)]
    angle = torch.rand(tokens, dim // 2, device="cuda")
    cos, sin = angle.cos(), angle.sin()
    op = ops.OPS.get("qk_norm_rope")
    rows: list[Row] = []
    for norm, rotary in (("full", "interleaved"), ("head", "half")):
        width = heads * dim if norm == "full" else dim
        weights = normal(2, width)
        rest = (*weights, cos, sin, EPS, norm, rotary)
        compiled = torch.compile(op.truth.run)
        peers: Peers = {
            "eager": lambda i, rest=rest: op.truth.run(*fused[i].unbind(2)[:2], *rest),
            "compile": lambda i, rest=rest, f=compiled: f(*fused[i].unbind(2)[:2], *rest),
        }
        for fast in op.fast:
            if "cuda" in fast.devices:
                peers[fast.name] = lambda i, rest=rest, f=fast.run: f(
                    *fused[i].unbind(2)[:2], *rest
                )
        gb = 4 * tokens * heads * dim * 2 / 1e9
        shape = f"{tokens}x{heads}x{dim} {norm} {rotary}"
        rows += rows_of("qk_norm_rope", shape, peers, gb, "GB/s", limit)
    return rows


def _activation_rows(tokens: int, width: int, limit: float) -> list[Row]:
    xs, ups = ([normal(tokens, width) for _ in range(SETS)] for _ in range(2))
    shape, gb = f"{tokens}x{width}", tokens * width * 2 / 1e9
    gelu = torch.compile(lambda x: functional.gelu(x, approximate="tanh"))
    peers: Peers = {
        "eager": lambda i: functional.gelu(xs[i], approximate="tanh"),
        "compile": lambda i: gelu(xs[i]),
        "triton": lambda i: triton_elementwise.gelu_tanh(xs[i]),
    }
    rows = rows_of("gelu_tanh", shape, peers, 2 * gb, "GB/s", limit)
    silu = torch.compile(lambda x, up: functional.silu(x) * up)
    peers = {
        "eager": lambda i: functional.silu(xs[i]) * ups[i],
        "compile": lambda i: silu(xs[i], ups[i]),
        "triton": lambda i: triton_elementwise.silu_mul(xs[i], ups[i]),
    }
    return rows + rows_of("silu_mul", shape, peers, 3 * gb, "GB/s", limit)


def attention() -> list[Row]:
    """Rows G1 to G5, each backend of torch forced."""
    assert not library.absent(), library.absent()
    n = 8192
    a, b = normal(n, n), normal(n, n)
    limit = 2 * n**3 / 1e9 / compare({"matmul": lambda _: a @ b})["matmul"]
    rows: list[Row] = [{"op": "matmul 8192", "TFLOP/s": limit}]
    for queries, keys, heads, dim in ATTENTION:
        qs = [normal(1, queries, heads, dim) for _ in range(SETS)]
        ks, vs = ([normal(1, keys, heads, dim) for _ in range(SETS)] for _ in range(2))

        def sdpa(i: int, backend: SDPBackend, q: Any = qs, k: Any = ks, v: Any = vs) -> Tensor:
            with sdpa_kernel(backend):
                return functional.scaled_dot_product_attention(
                    *(x[i].transpose(1, 2) for x in (q, k, v))
                )

        peers: Peers = {
            "cudnn": lambda i, f=sdpa: f(i, SDPBackend.CUDNN_ATTENTION),
            "flash": lambda i, f=sdpa: f(i, SDPBackend.FLASH_ATTENTION),
            "cuda": lambda i, q=qs, k=ks, v=vs: cuda_attention.attention(q[i], k[i], v[i]),
            "triton": lambda i, q=qs, k=ks, v=vs: triton_attention.attention(q[i], k[i], v[i]),
        }
        if torch.cuda.get_device_capability() == (9, 0):
            peers["cuda_sm90"] = lambda i, q=qs, k=ks, v=vs: cuda_attention.attention_sm90(
                q[i], k[i], v[i]
            )
        tflop = 4 * queries * keys * heads * dim / 1e12
        shape = f"{queries}x{keys}x{heads}x{dim}"
        rows += rows_of("attention", shape, peers, tflop, "TFLOP/s", limit)
    return rows


def lora() -> list[Row]:
    """Rows G12 and G13: all matrices of a model in one launch against one after another."""
    limit = copy_rate()
    rows: list[Row] = [{"op": "copy", "GB/s": limit}]
    for model, (shapes, blocks) in {"Wan 1.3B": WAN_1B, "Wan 14B": WAN_14B}.items():
        weights = [normal(*shape) * 0.02 for _ in range(blocks) for shape in shapes]
        count = sum(w.numel() for w in weights)
        for rank in (16, 64, 128):
            a = [normal(rank, w.shape[1]) for w in weights]
            b = [normal(w.shape[0], rank) * (0.002 / rank**0.5) for w in weights]
            scales = [1.0] * len(weights)
            rows += _lora_rows(f"{model} r{rank}", weights, a, b, scales, count, limit)
        del weights
        torch.cuda.empty_cache()
    return rows


def _lora_rows(
    shape: str,
    weights: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    scales: list[float],
    count: int,
    limit: float,
) -> list[Row]:
    before = [w[:8].clone() for w in weights]
    codes = triton_lora.lora_merge_(weights, a, b, scales)
    triton_lora.lora_unmerge_(weights, a, b, scales, codes)
    same = all(torch.equal(w[:8], old) for w, old in zip(weights, before, strict=True))
    bits, failed = codes.bits_per_weight(weights), len(codes.failed())

    def peft(_: int) -> None:
        for w, down, up in zip(weights, a, b, strict=True):
            w += (up @ down) * 1.0

    def cycle(_: int) -> None:
        kept = triton_lora.lora_merge_(weights, a, b, scales)
        triton_lora.lora_unmerge_(weights, a, b, scales, kept)

    def merge(_: int) -> None:
        from sgl_diffusion.kernels.lora import lora_merge_launch

        lora_merge_launch(weights, a, b, scales, keep=False)

    deltas = [
        [ops.LoraDelta(down, up, scale)] for down, up, scale in zip(a, b, scales, strict=True)
    ]

    def cuda_cycle(_: int) -> None:
        records = cuda_lora.merge(weights[0], weights, deltas)
        named = [
            ops.LoraRecord(*parts, 0, (w.shape[0], w.shape[1]), tuple(some))
            for w, parts, some in zip(weights, records, deltas, strict=True)
        ]
        found = cuda_lora.unmerge(weights[0], weights, deltas, named)
        assert found == [record.checksum for record in named]

    # A cycle reads and writes the weights twice, and writes and reads the codes.
    gb = count * 4 / 1e9
    rows = rows_of("lora_merge_", shape, {"peft": peft, "triton": merge}, gb, "GB/s", limit)
    rows += rows_of(
        "lora merge and unmerge",
        shape,
        {"triton": cycle, "cuda": cuda_cycle},
        2 * gb + count / 1e9,
        "GB/s",
        limit,
    )
    return [
        *rows,
        {"op": "lora exact", "shape": shape, "same": same, "bits": bits, "failed": failed},
    ]
