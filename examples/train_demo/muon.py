"""Muon: steps along the nearest orthogonal matrix of the mean gradient, for matrices and, flattened
to one row per output channel, for convolutions. Small nets learn several times faster than with
Adam, which stays for everything else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

_MOMENTUM = 0.95
_ROUNDS = 5
_SMALLEST = 8  # a side below it is not worth it


def is_matrix(parameter: Tensor) -> bool:
    if parameter.dim() < 2:
        return False
    return min(parameter.shape[0], parameter[0].numel()) >= _SMALLEST


class Muon:
    def __init__(self, parameters: Iterable[nn.Parameter], weight_decay: float = 0.0) -> None:
        self._parameters = list(parameters)
        self._means = [torch.zeros_like(p) for p in self._parameters]
        self._decay = weight_decay

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """An update is as long as Adam's would be at this rate."""
        alike: dict[torch.Size, list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
        for parameter, mean in zip(self._parameters, self._means, strict=True):
            if parameter.grad is None:
                continue
            mean.lerp_(parameter.grad, 1 - _MOMENTUM)
            ahead = parameter.grad.lerp(mean, _MOMENTUM).flatten(1)
            alike[ahead.shape].append((parameter, ahead))
        for shape, group in alike.items():
            steps = orthogonal(torch.stack([ahead for _, ahead in group]))
            for (parameter, _), step in zip(group, steps, strict=True):
                parameter.mul_(1 - rate * self._decay)
                parameter.add_(step.view_as(parameter), alpha=-0.2 * rate * max(shape) ** 0.5)


class Both:
    """Muon for what it `takes` of the matrices, Adam for all other parameters."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        takes: Iterable[nn.Parameter],
        *,
        rate: float,
        adam_rate: float,
        weight_decay: float = 0.0,
    ) -> None:
        matrices = [p for p in takes if is_matrix(p)]
        taken = {id(p) for p in matrices}
        rest = [p for p in parameters if id(p) not in taken]
        self._muon, self._rate, self._adam_rate = Muon(matrices, weight_decay), rate, adam_rate
        self._adam = torch.optim.AdamW(rest, lr=adam_rate, betas=(0.9, 0.98), weight_decay=0.0)

    def step(self, share: float) -> None:
        """One step at this share of the rates."""
        for group in self._adam.param_groups:
            group["lr"] = share * self._adam_rate
        self._adam.step()
        self._muon.step(share * self._rate)


def orthogonal(matrices: Tensor) -> Tensor:
    """[N, rows, columns] to about the nearest with singular values of 1, by Newton-Schulz; bf16 is
    exact enough for a direction."""
    x = (matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    for _ in range(_ROUNDS):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return (x.mT if tall else x).float()
