"""Few tokens at a time through the layers of a decoder of transformers, in few calls.

On a CPU a step of one token costs what its calls cost, of which the library's modules make
hundreds: here the same weights want half as many, and cheaper ones. All decoders of both families
are built alike: attention whose heads may be normalised, then one network or several experts, of
which a token takes a few, and which may have one beside them that every token takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sgl_diffusion.ar.decoding import Record

Net = Callable[[Tensor], Tensor]

# One thread reads a matrix of this many bytes in some 30 us, a few times what it takes to wake
# another one.
_FOR_ALL_THREADS = 1 << 20


class Memory(Protocol):
    """The keys and values of earlier tokens."""

    def put(self, layer: int, fresh: Tensor) -> tuple[Tensor, Tensor]:
        """Keeps keys and values of new tokens, [2, rows, heads, tokens, width]; returns those of
        all that are looked at, [rows, heads, length, width]."""


class Tokenwise:
    """The layers of `decoder`, and its last norm. The weights stay the decoder's, but those that
    the same vectors go through lie behind each other from now on, to be one matrix here."""

    @torch.no_grad()
    def __init__(self, decoder: Any) -> None:
        self._layers = [_Layer(layer, index) for index, layer in enumerate(decoder.layers)]
        self._norm = _norm(decoder.norm)
        self._turns = decoder.rotary_emb
        self._small = all(layer.bytes < _FOR_ALL_THREADS for layer in self._layers)

    @torch.inference_mode()
    def __call__(self, vectors: Tensor, positions: Tensor, memory: Memory, mask: Tensor) -> Tensor:
        """`vectors` are [rows, tokens, width], `positions` as the decoder's rotary embedding takes
        them; `mask`, [rows, 1, tokens, length], is true where a token looks. One token alone looks
        everywhere."""
        hidden = None
        if len(mask) * mask.shape[2] > 1:
            hidden = torch.zeros_like(mask, dtype=vectors.dtype).masked_fill_(~mask, -torch.inf)
        cos, sin = (turn[:, :, None] for turn in self._turns(vectors, positions))
        half = sin.shape[-1] // 2
        turns = cos, torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
        with _one_thread() if self._small else nullcontext():
            for layer in self._layers:
                vectors = layer(vectors, turns, memory, hidden)
        return self._norm(vectors)


def tokenwise(decoder: Any, record: Record | None) -> Tokenwise | None:
    """None where steps are recorded, and on a GPU: it would wait for the choice of experts."""
    on_cpu = next(decoder.parameters()).device.type == "cpu"
    return Tokenwise(decoder) if on_cpu and record is None else None


class _Layer:
    def __init__(self, layer: Any, index: int) -> None:
        attention = layer.self_attn
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        self._index, self._width, self._scale = index, attention.head_dim, attention.scaling
        self._heads, self._kept = (net.out_features // self._width for net in projections[:2])
        self._before = _norm(layer.input_layernorm)
        self._between = _norm(layer.post_attention_layernorm)
        self._weight, self._bias = _joined(*projections)
        self.bytes = self._weight.nbytes
        self._out = _linear(attention.o_proj)
        self._net = _mixture(layer.mlp) if hasattr(layer.mlp, "experts") else _network(layer.mlp)
        self._norms: Tensor | None = None
        if hasattr(attention, "q_norm"):
            self._eps = attention.q_norm.variance_epsilon
            weights = attention.q_norm.weight, attention.k_norm.weight
            parts = zip(weights, (self._heads, self._kept), strict=True)
            self._norms = torch.cat([weight.expand(heads, -1) for weight, heads in parts])

    def __call__(
        self, vectors: Tensor, turns: tuple[Tensor, Tensor], memory: Memory, mask: Tensor | None
    ) -> Tensor:
        rows, tokens, _ = vectors.shape
        vectors = vectors + self._out(self._attention(vectors, turns, memory, mask))
        found = self._net(self._between(vectors).view(rows * tokens, -1))
        return vectors + found.view(rows, tokens, -1)

    def _attention(
        self, vectors: Tensor, turns: tuple[Tensor, Tensor], memory: Memory, mask: Tensor | None
    ) -> Tensor:
        rows, tokens, _ = vectors.shape
        heads, kept, width = self._heads, self._kept, self._width
        parts = F.linear(self._before(vectors), self._weight, self._bias)
        parts = parts.view(rows, tokens, heads + 2 * kept, width)
        turned = parts[:, :, : heads + kept]
        if self._norms is not None:
            turned = F.rms_norm(turned, (width,), None, self._eps) * self._norms
        cos, sin = turns
        turned = torch.addcmul(turned * cos, turned.roll(width // 2, -1), sin)
        fresh = torch.stack([turned[:, :, heads:], parts[:, :, heads + kept :]])
        keys, values = memory.put(self._index, fresh.transpose(2, 3))
        # The heads that share keys are looked up as if they were tokens.
        shared = heads // kept
        asked = turned[:, :, :heads].reshape(rows, tokens, kept, shared, width)
        asked = asked.permute(0, 2, 3, 1, 4).reshape(rows, kept, shared * tokens, width)
        if mask is not None and tokens > 1:
            mask = mask.repeat(1, 1, shared, 1)
        found = F.scaled_dot_product_attention(asked, keys, values, mask, scale=self._scale)
        found = found.view(rows, kept, shared, tokens, width).permute(0, 3, 1, 2, 4)
        return found.reshape(rows, tokens, heads * width)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Of those of torch; the number is that of the calling thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _norm(net: Any) -> Net:
    weight, eps = net.weight, net.variance_epsilon
    return lambda vectors: F.rms_norm(vectors, weight.shape, weight, eps)


def _linear(net: Any) -> Net:
    weight, bias = net.weight, net.bias
    return lambda vectors: F.linear(vectors, weight, bias)


def _joined(*nets: Any) -> tuple[Tensor, Tensor | None]:
    """One matrix of several linear layers, which become views of it."""
    weight = torch.cat([net.weight for net in nets])
    sizes = [net.out_features for net in nets]
    for net, part in zip(nets, weight.split(sizes), strict=True):
        net.weight.data = part
    if nets[0].bias is None:
        return weight, None
    return weight, torch.cat([net.bias for net in nets])


def _network(net: Any) -> Net:
    (wide, _), narrow, act = _joined(net.gate_proj, net.up_proj), net.down_proj.weight, net.act_fn

    def run(vectors: Tensor) -> Tensor:
        gate, up = F.linear(vectors, wide).chunk(2, dim=-1)
        return F.linear(act(gate) * up, narrow)

    return run


def _mixture(block: Any) -> Net:
    experts = _Experts(block)
    if not hasattr(block, "shared_expert"):
        return experts
    shared, gate = _network(block.shared_expert), _linear(block.shared_expert_gate)
    return lambda vectors: experts(vectors) + gate(vectors).sigmoid() * shared(vectors)


class _Experts:
    """Each expert takes all of its tokens at once; those that no token takes are not touched."""

    def __init__(self, block: Any) -> None:
        gate, experts = block.gate, block.experts
        self._gate, self._most, self._normed = gate.weight, gate.top_k, gate.norm_topk_prob
        self._act = experts.act_fn
        self._wide, self._narrow = experts.gate_up_proj.unbind(), experts.down_proj.unbind()

    def __call__(self, vectors: Tensor) -> Tensor:
        chances = F.linear(vectors, self._gate).softmax(-1, dtype=torch.float)
        shares, experts = chances.topk(self._most, dim=-1)
        if self._normed:
            shares = shares / shares.sum(-1, keepdim=True)
        if len(vectors) == 1:
            return self._alone(vectors, experts.tolist()[0], shares.tolist()[0])
        found = torch.zeros_like(vectors)
        places: dict[int, list[int]] = {}
        for place, expert in enumerate(experts.flatten().tolist()):
            places.setdefault(expert, []).append(place)
        shares = shares.to(vectors.dtype).view(-1, 1)
        for expert, taken in places.items():
            at = torch.tensor(taken)
            rows = at // self._most
            found.index_add_(0, rows, self._one(expert, vectors[rows]) * shares[at])
        return found

    def _alone(self, vectors: Tensor, experts: list[int], shares: list[float]) -> Tensor:
        found = self._one(experts[0], vectors) * shares[0]
        for expert, share in zip(experts[1:], shares[1:], strict=True):
            found.add_(self._one(expert, vectors), alpha=share)
        return found

    def _one(self, expert: int, vectors: Tensor) -> Tensor:
        gate, up = F.linear(vectors, self._wide[expert]).chunk(2, dim=-1)
        return F.linear(self._act(gate) * up, self._narrow[expert])
