"""How the ranks of one stage are arranged: guidance branches × ring × Ulysses. Imports no torch.

The tokens of a sequence are spread over ring × Ulysses ranks; the two branches of guidance may run
on two such sets of ranks at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.errors import ConfigError

BRANCHES = 2  # with the prompt and without it


@dataclass(frozen=True, order=True)
class Layout:
    cfg: int = 1
    ring: int = 1
    ulysses: int = 1

    @property
    def tokens(self) -> int:
        """Over how many ranks one sequence is spread."""
        return self.ring * self.ulysses

    @property
    def ranks(self) -> int:
        return self.cfg * self.tokens

    def __str__(self) -> str:
        return f"cfg {self.cfg} x ring {self.ring} x ulysses {self.ulysses}"


@dataclass(frozen=True)
class Degrees:
    """What the operator asked for; None leaves a degree open."""

    ranks: int
    cfg: int | None = None
    ring: int | None = None
    ulysses: int | None = None

    @classmethod
    def of(cls, options: EngineOptions) -> Degrees:
        """Of the ranks of one replica."""
        return cls(
            ranks_each(options),
            options.cfg_parallel_size,
            options.ring_degree,
            options.ulysses_degree,
        )

    def layouts(self) -> list[Layout]:
        """Every arrangement of the ranks with the given degrees; raises if there is none."""
        if self.cfg is not None and self.cfg > BRANCHES:
            raise ConfigError(
                f"cfg_parallel_size is {self.cfg}; guidance has {BRANCHES} branches.",
                hint="Use 1 or 2.",
                param="cfg_parallel_size",
            )
        found = [
            Layout(cfg, ring, self.ranks // (cfg * ring))
            for cfg in _choices(self.cfg, range(1, BRANCHES + 1))
            for ring in _choices(self.ring, range(1, self.ranks + 1))
            if self.ranks % (cfg * ring) == 0
        ]
        found = [layout for layout in found if self.ulysses in (None, layout.ulysses)]
        if not found:
            raise ConfigError(
                f"{self.ranks} ranks cannot be arranged as {self._given()}.",
                hint=f"The degrees multiply to --num-gpus; each divides {self.ranks}: "
                f"{_listed(divisors(self.ranks))}.",
                param="num_gpus",
            )
        return found

    def fitting(self, heads: int) -> list[Layout]:
        """Those that a model with so many attention heads can have; raises if there is none."""
        layouts = self.layouts()
        fitting = [layout for layout in layouts if layout.ulysses <= heads]
        if not fitting:
            raise ConfigError(
                f"{heads} attention heads cannot be spread over "
                f"{' or '.join(str(n) for n in sorted({x.ulysses for x in layouts}))} "
                "Ulysses ranks.",
                hint=f"Valid Ulysses degrees of this model: 1 to {heads}, best those that divide "
                f"it: {_listed(divisors(heads))}; --ring-degree takes any number of ranks.",
                param="ulysses_degree",
            )
        return fitting

    def _given(self) -> str:
        names = {"cfg": self.cfg, "ring": self.ring, "ulysses": self.ulysses}
        return " x ".join(f"{name} {size}" for name, size in names.items() if size is not None)


def ranks_each(options: EngineOptions) -> int:
    """How many ranks a replica has."""
    ranks, more = divmod(options.num_gpus, options.dp_size)
    if more or not ranks:
        raise ConfigError(
            f"{options.num_gpus} ranks cannot be shared by {options.dp_size} replicas.",
            hint=f"--num-gpus counts the ranks of all replicas, such as {options.dp_size} or "
            f"{2 * options.dp_size} for --dp-size {options.dp_size}.",
            param="dp_size",
        )
    return ranks


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _choices(given: int | None, free: range) -> list[int]:
    return list(free) if given is None else [given]


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
