"""Doing the same on every rank, and knowing what became of it everywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from sgl_diffusion.base.errors import ConfigError, SglError, from_wire, to_wire
from sgl_diffusion.base.log import get_logger
from sgl_diffusion.distributed.group import Group

T = TypeVar("T")

log = get_logger(__name__)


class Outcome(msgspec.Struct, frozen=True):
    """Of one rank; `ready` is false where it was not done yet."""

    error: dict[str, Any] | None = None
    ready: bool = True


_outcomes = msgspec.msgpack.Decoder(Outcome)


def agree(everyone: Group, error: Exception | None, *, ready: bool = True) -> list[Outcome]:
    """The outcomes of all ranks; every rank calls it once it knows its own."""
    outcome = Outcome(None if error is None else to_wire(error), ready)
    collected = everyone.collect(msgspec.msgpack.encode(outcome))
    return [_outcomes.decode(data) for data in collected]


def agree_on(everyone: Group, options: dict[str, Any]) -> None:
    """Raises on every rank if one was started with other options than the first."""
    collected = everyone.collect(msgspec.msgpack.encode(options))
    first = msgspec.msgpack.decode(collected[0])
    for rank, data in enumerate(collected):
        theirs = msgspec.msgpack.decode(data)
        if differing := [name for name in first if theirs.get(name) != first[name]]:
            flags = ", ".join("--" + name.replace("_", "-") for name in differing)
            raise ConfigError(
                f"Rank {rank} was started with another value of {flags} than rank 0.",
                hint="Give the command the same options on every machine, but for --node-rank.",
                param=differing[0],
            )


def together(everyone: Group, do: Callable[[], T]) -> T:
    """What `do` gives here; if it raises on any rank, this raises on every rank."""
    try:
        result = do()
    except Exception as error:
        if not isinstance(error, SglError):
            log.exception("rank %d failed", everyone.index)
        agree(everyone, error)
        raise
    for outcome in agree(everyone, None):
        if outcome.error is not None:
            raise from_wire(outcome.error)
    return result
