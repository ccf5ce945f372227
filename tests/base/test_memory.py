"""How much memory a model may take."""

from __future__ import annotations

import pytest
import torch

from sgl_diffusion.base import memory
from sgl_diffusion.base.errors import ConfigError
from sgl_diffusion.base.memory import memory_budget

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("option", "size"),
    [
        ("8g", 8 << 30),
        ("6000m", 6000 << 20),
        ("2.5GiB", 5 << 29),
        ("700000", 700_000),
        ("0.5", 50 * 10**9),
        (" 1G ", 1 << 30),
        ("1t", 100 * 10**9),  # more than there is
    ],
)
def test_a_budget_is_a_size_or_a_share(
    option: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: 100 * 10**9)
    assert memory_budget(option, CPU) == size


def test_without_a_budget_nearly_all_that_is_free_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: 1_000_000)
    assert memory_budget(None, CPU) == 950_000


def test_where_nobody_knows_what_is_free_a_size_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: None)
    assert memory_budget(None, CPU) is None
    assert memory_budget("8g", CPU) == 8 << 30
    with pytest.raises(ConfigError, match="does not tell"):
        memory_budget("0.5", CPU)


@pytest.mark.parametrize("option", ["", "much", "-1g", "0", "8x", "1.2.3", "9" * 400])
def test_other_budgets_are_errors(option: str) -> None:
    with pytest.raises(ConfigError, match="memory_budget") as caught:
        memory_budget(option, CPU)
    assert caught.value.param == "memory_budget"
