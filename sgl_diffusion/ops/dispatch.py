"""How a call of an op finds its implementation.

An op is a signature, a torch truth and faster implementations that declare what they support.
Automatic choice takes the first implementation that can run the call and may fall back, with one
log line; an implementation that `SGLD_OPS=norm_modulate=triton,...` (or `using`) names runs the
call or raises. Ops have no backward.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sgl_diffusion.base import env
from sgl_diffusion.base.errors import ConfigError
from sgl_diffusion.base.log import get_logger
from sgl_diffusion.base.registry import Registry, suggest
from sgl_diffusion.ops.validated import result_file

log = get_logger(__name__)

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

OPS: Registry[Op] = Registry("op")

_counts: dict[tuple[str, str], int] = {}
_counts_lock = threading.Lock()
_named: dict[str, str] | None = None
_logged: set[str] = set()


def _always(*_: Any) -> str:
    return ""


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op and what it supports.

    `sm` is the range of GPU architectures (90 for sm_90). On `named_devices` it runs only when it
    is named. `absent` says why it cannot run in this process and how to get it ("" when it can); it
    is asked once per device and dtype. `refuses` says why it cannot take these arguments (shapes,
    strides, other dtypes); it is asked on every call.
    """

    name: str
    run: Callable[..., Any]
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[torch.dtype, ...] = FLOATS
    sm: range = range(1000)
    named_devices: tuple[str, ...] = ()
    absent: Callable[[], str] = _always
    refuses: Callable[..., str] = _always

    def unsupported(self, device: torch.device, dtype: torch.dtype) -> str:
        """Why it cannot work on a device and dtype at all, or ""."""
        if device.type not in self.devices + self.named_devices:
            return f"it runs on {' and '.join(self.devices)}, not on {device.type}"
        if dtype not in self.dtypes:
            names = ", ".join(str(known).removeprefix("torch.") for known in self.dtypes)
            return f"it takes {names}, not {str(dtype).removeprefix('torch.')}"
        if device.type == "cuda" and sm_of(device) not in self.sm:
            return f"it is not made for sm_{sm_of(device)}"
        return self.absent()


class Op:
    """Calling it runs the implementation that arguments, environment and build allow."""

    def __init__(self, name: str, truth: Callable[..., Any], *fast: Implementation) -> None:
        self.name = name
        self.fast = fast
        self.truth = Implementation("torch", truth)
        self._plans: dict[tuple[torch.device, torch.dtype], tuple[Implementation, ...]] = {}
        OPS.add(name, self)

    def __call__(self, x: Tensor, *args: Any) -> Any:
        """Run the op; `x` is the tensor whose device and dtype decide."""
        compiling = torch.compiler.is_compiling()
        if compiling:
            _prepare(self.name, x.device, x.dtype)
        key = (x.device, x.dtype)
        plan = self._plans.get(key)
        if plan is None:
            plan = self.prepare(*key)
        for implementation in plan:
            reason = implementation.refuses(x, *args)
            if not reason:
                if not compiling:
                    _count(self.name, implementation.name)
                return implementation.run(x, *args)
            if compiling:
                _decline(self.name, implementation.name, reason)
            else:
                self.decline(implementation, reason)
        raise AssertionError(f"{self.name}: the torch truth refused a call")

    def by(self, names: tuple[str, ...], x: Tensor, *args: Any) -> Any:
        """Run the first of some named implementations that can take the call, or raise.

        For a caller that was told which to use; `SGLD_OPS` and `using` still come first.
        """
        if self.name in named():
            return self(x, *args)
        reasons = []
        for name in names:
            implementation = self.implementation(name)
            reason = _unsupported(self.name, name, x.device, x.dtype)
            reason = reason or implementation.refuses(x, *args)
            if not reason:
                if not torch.compiler.is_compiling():
                    _count(self.name, name)
                return implementation.run(x, *args)
            reasons.append(f"{name}: {reason}")
        raise ConfigError(f"{self.name} cannot run this call by {'; '.join(reasons)}.")

    def names(self) -> list[str]:
        return [implementation.name for implementation in (*self.fast, self.truth)]

    def implementation(self, name: str) -> Implementation:
        for implementation in (*self.fast, self.truth):
            if implementation.name == name:
                return implementation
        raise ConfigError(
            f"Op {self.name} has no implementation {name!r}.", hint=suggest(name, self.names())
        )

    def forget(self) -> None:
        """Choose anew on the next call: what is named or what can run has changed."""
        self._plans.clear()

    def prepare(self, device: torch.device, dtype: torch.dtype) -> tuple[Implementation, ...]:
        """The implementations to try on a device and dtype, in order."""
        name = named().get(self.name)
        if name is not None:
            implementation = self.implementation(name)
            if implementation is not self.truth:
                reason = implementation.unsupported(device, dtype)
                if reason:
                    self.decline(implementation, reason)
            plan: tuple[Implementation, ...] = (implementation,)
        else:
            plan = (*(i for i in self.fast if self._automatic(i, device, dtype)), self.truth)
        self._plans[device, dtype] = plan
        return plan

    def _automatic(
        self, implementation: Implementation, device: torch.device, dtype: torch.dtype
    ) -> bool:
        """Whether automatic choice may take an implementation; logs once why not."""
        if device.type not in implementation.devices:
            return False
        reason = implementation.unsupported(device, dtype)
        if not reason and device.type == "cuda":
            arch = f"sm_{sm_of(device)}"
            if not result_file(self.name, implementation.name, arch):
                reason = f"it was never validated on {arch}"
        if reason:
            self._log_once(implementation, reason)
        return not reason

    def decline(self, implementation: Implementation, reason: str) -> None:
        """A named implementation must work; an automatic choice goes on to the next one."""
        if named().get(self.name) == implementation.name:
            raise ConfigError(
                f"{self.name}={implementation.name} cannot run this call: {reason}.",
                hint="Take it out of SGLD_OPS to let the engine choose.",
            )
        self._log_once(implementation, reason)

    def _log_once(self, implementation: Implementation, reason: str) -> None:
        line = f"{self.name} does not use {implementation.name}: {reason}"
        if line not in _logged:
            _logged.add(line)
            log.info("%s", line)


# torch.compile runs these while it traces, outside of the graph: they load files and log.
@torch.compiler.assume_constant_result
def _prepare(op: str, device: torch.device, dtype: torch.dtype) -> None:
    OPS.get(op).prepare(device, dtype)


@torch.compiler.assume_constant_result
def _unsupported(op: str, implementation: str, device: torch.device, dtype: torch.dtype) -> str:
    return OPS.get(op).implementation(implementation).unsupported(device, dtype)


@torch.compiler.assume_constant_result
def _decline(op: str, implementation: str, reason: str) -> None:
    OPS.get(op).decline(OPS.get(op).implementation(implementation), reason)


def sm_of(device: torch.device) -> int:
    """The architecture of a GPU: 90 for sm_90."""
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def parse(text: str) -> dict[str, str]:
    """`norm_modulate=triton,gelu_tanh=torch` as a table; an unknown name is an error."""
    table: dict[str, str] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        op, equals, implementation = (part.strip() for part in item.partition("="))
        if not equals:
            raise ConfigError(
                f"SGLD_OPS={text!r}: {item!r} names no implementation.",
                hint="Write op=name,op=name.",
            )
        OPS.get(op).implementation(implementation)
        table[op] = implementation
    return table


def named() -> dict[str, str]:
    """The implementation each op was told to use, from SGLD_OPS on first use."""
    global _named
    if _named is None:
        _named = parse(str(env.get("SGLD_OPS")))
    return _named


def _set_named(table: dict[str, str] | None) -> None:
    global _named
    _named = table
    for name in OPS:
        OPS.get(name).forget()


@contextmanager
def using(**implementations: str) -> Iterator[None]:
    """Name implementations in the whole process: `with ops.using(norm_modulate="torch"):`."""
    before = named()
    _set_named(before | {op: parse(f"{op}={name}")[op] for op, name in implementations.items()})
    try:
        yield
    finally:
        _set_named(before)


def _count(op: str, implementation: str) -> None:
    key = (op, implementation)
    with _counts_lock:
        _counts[key] = _counts.get(key, 0) + 1


def counts() -> dict[tuple[str, str], int]:
    """Calls so far by (op, implementation); calls inside a compiled graph are not seen."""
    with _counts_lock:
        return dict(_counts)


def reset_counts() -> None:
    with _counts_lock:
        _counts.clear()
