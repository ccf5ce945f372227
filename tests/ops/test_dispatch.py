"""How a call finds its implementation: order, fallback, naming, validation, counting, tracing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sgl_diffusion import ops
from sgl_diffusion.base.errors import ConfigError
from sgl_diffusion.base.registry import Registry
from sgl_diffusion.ops import dispatch
from sgl_diffusion.ops.dispatch import Implementation, Op

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ops of a test are known to that test only."""
    monkeypatch.setattr(dispatch, "OPS", Registry("op"))
    monkeypatch.setattr(dispatch, "_named", None)
    monkeypatch.setattr(dispatch, "_logged", set())
    monkeypatch.delenv("SGLD_OPS", raising=False)
    ops.reset_counts()
    yield
    ops.reset_counts()


def _adds(amount: float) -> Callable[..., Tensor]:
    return lambda x, *args: x + amount


def _truth(x: Tensor, *args: Any) -> Tensor:
    return x + 1


def test_the_first_that_can_runs_and_the_rest_is_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "sgl_diffusion.ops")
    op = Op(
        "add",
        _truth,
        Implementation("missing", _adds(10), ("cpu",), absent=lambda: "it is not built"),
        Implementation("half", _adds(20), ("cpu",), dtypes=(torch.float16,)),
        Implementation("elsewhere", _adds(30), ("cuda",)),
        Implementation(
            "short", _adds(40), ("cpu",), refuses=lambda x: "too long" if len(x) > 2 else ""
        ),
    )
    for _ in range(2):
        assert op(torch.zeros(2))[0] == 40
        assert op(torch.zeros(3))[0] == 1
    assert op(torch.zeros(2, dtype=torch.float16))[0] == 20
    assert ops.counts() == {("add", "short"): 2, ("add", "torch"): 2, ("add", "half"): 1}
    assert [record.getMessage() for record in caplog.records] == [
        "add does not use missing: it is not built",
        "add does not use half: it takes float16, not float32",
        "add does not use short: too long",
    ]


def test_a_named_implementation_runs_or_raises() -> None:
    op = Op(
        "add",
        _truth,
        Implementation("fast", _adds(10), ("cpu",), dtypes=(torch.float32,)),
        Implementation("missing", _adds(20), ("cpu",), absent=lambda: "it is not built"),
        Implementation("tool", _adds(30), ("cuda",), named_devices=("cpu",)),
        Implementation("short", _adds(40), ("cpu",), refuses=lambda x: "too long"),
    )
    x = torch.zeros(3)
    assert op(x)[0] == 10
    with ops.using(add="torch"):
        assert op(x)[0] == 1
        with ops.using(add="tool"):
            assert op(x)[0] == 30
        with ops.using(add="missing"), pytest.raises(ConfigError, match="it is not built"):
            op(x)
        with ops.using(add="short"), pytest.raises(ConfigError, match="cannot run.*too long"):
            op(x)
        with ops.using(add="fast"), pytest.raises(ConfigError, match="it takes float32, not"):
            op(x.bfloat16())
        assert op(x)[0] == 1
    assert op(x)[0] == 10


def test_the_environment_names_implementations(monkeypatch: pytest.MonkeyPatch) -> None:
    op = Op("add", _truth, Implementation("fast", _adds(10)))
    monkeypatch.setenv("SGLD_OPS", " add = torch ,")
    assert op(torch.zeros(1)) == 1
    assert dispatch.named() == {"add": "torch"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ad=fast", "Did you mean 'add'"),
        ("add=fats", "Did you mean 'fast'"),
        ("add", "names no implementation"),
    ],
)
def test_a_wrong_name_is_an_error(text: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op = Op("add", _truth, Implementation("fast", _adds(10)))
    monkeypatch.setenv("SGLD_OPS", text)
    with pytest.raises(ConfigError, match=message):
        op(torch.zeros(1))


def test_a_gpu_implementation_needs_validation(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "sgl_diffusion.ops")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    table: dict[tuple[str, str, str], str] = {}
    monkeypatch.setattr("sgl_diffusion.ops.validated.VALIDATED", table)
    hopper = Implementation("hopper", _adds(10), ("cuda",), sm=range(90, 91))
    ampere = Implementation("ampere", _adds(20), ("cuda",), sm=range(80, 90))
    op = Op("add", _truth, hopper, ampere)

    assert op.prepare(GPU, torch.float32) == (op.truth,)
    assert "add does not use hopper: it was never validated on sm_90" in caplog.messages
    assert "add does not use ampere: it is not made for sm_90" in caplog.messages
    with ops.using(add="hopper"):
        assert op.prepare(GPU, torch.float32) == (hopper,)
    with ops.using(add="ampere"), pytest.raises(ConfigError, match="not made for sm_90"):
        op.prepare(GPU, torch.float32)
    table["add", "hopper", "sm_90"] = "benchmarks/results/h200-add.json"
    assert op.prepare(GPU, torch.float32) == (hopper, op.truth)


def test_the_torch_truth_runs_on_any_device_and_dtype() -> None:
    op = Op("add", _truth, Implementation("fast", _adds(10), ("cpu",)))
    assert op(torch.zeros(2, device="meta")).device.type == "meta"
    assert op(torch.zeros(2, dtype=torch.int64))[0] == 1


def test_compiled_code_keeps_one_graph_and_follows_a_new_choice() -> None:
    op = Op(
        "add",
        _truth,
        Implementation("missing", _adds(10), ("cpu",), absent=lambda: "it is not built"),
        Implementation("fast", _adds(20), ("cpu",)),
    )
    compiled = torch.compile(lambda x: op(x) * 2, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1)) == 40
    with ops.using(add="torch"):
        assert compiled(torch.zeros(1)) == 2
    assert compiled(torch.zeros(1)) == 40
    assert ops.counts() == {}


def test_a_compiled_call_falls_back_too() -> None:
    op = Op(
        "add", _truth, Implementation("no", _adds(10), ("cpu",), refuses=lambda x: "it never does")
    )
    compiled = torch.compile(lambda x: op(x), fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1)) == 1
    with ops.using(add="no"), pytest.raises(Exception, match="it never does"):
        torch.compile(lambda x: op(x) - 1, fullgraph=True, backend="eager")(torch.zeros(1))
