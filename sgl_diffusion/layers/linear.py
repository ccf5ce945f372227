"""Linear layers that know what their output rows mean."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from sgl_diffusion import ops


class Linear(nn.Linear):
    """`y = x Wᵀ + b`.

    A fused layer holds several projections of one input: `segments` maps the name of each to its
    rows, so that checkpoint rules and adapters can address them one by one. A plain layer has one
    segment with the empty name.
    """

    segments: Mapping[str, slice]

    def __init__(
        self, in_features: int, out_features: int | Mapping[str, int], bias: bool = True
    ) -> None:
        sizes = {"": out_features} if isinstance(out_features, int) else dict(out_features)
        super().__init__(in_features, sum(sizes.values()), bias=bias)
        self.segments = {}
        start = 0
        for name, size in sizes.items():
            self.segments[name] = slice(start, start + size)
            start += size

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)

    def split(self, y: Tensor) -> list[Tensor]:
        """The segments of an output [..., out], as views in the order they were declared."""
        return [y[..., rows] for rows in self.segments.values()]
