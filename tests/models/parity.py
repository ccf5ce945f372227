"""What the tests of the transformers share: a forward of ours beside one of diffusers'."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sgl_diffusion import ops
from sgl_diffusion.loader.index import read_config
from sgl_diffusion.loader.rules import Rules
from sgl_diffusion.loader.weights import load_weights

T = TypeVar("T", bound=nn.Module)
Run = Callable[[Any, Any], Tensor]


def load(
    kind: type[T], params: Any, rules: Rules, path: Path, dtype: torch.dtype = torch.float32
) -> T:
    """Our transformer with the weights of a repository folder; `params` reads its config."""
    folder = path / "transformer"
    with torch.device("meta"):
        model = kind(params.from_config(read_config(folder)))
    load_weights(model, folder, rules, dtype=dtype)
    return model


def load_theirs(name: str, path: Path) -> Any:
    """diffusers' transformer of that class, from the same folder."""
    import diffusers

    return getattr(diffusers, name).from_pretrained(path / "transformer").eval()


def assert_close(got: Tensor, expected: Tensor) -> None:
    """Equal but for the rounding of fp32."""
    assert got.shape == expected.shape
    assert float((got - expected).abs().max() / expected.abs().max()) < 2e-5


def assert_as_exact(
    ours: Any, exact: Any, given: Any, run_ours: Run, run_theirs: Run, dtype: torch.dtype
) -> set[str]:
    """In fp32 equal to diffusers' `exact`, in half precision no further from it than diffusers
    itself by a tenth; the ops that ran."""
    reference = run_theirs(exact, given)
    ops.reset_counts()
    got = run_ours(ours, given).float()
    used = {op for op, _ in ops.counts()}
    if dtype == torch.float32:
        assert_close(got, reference)
    else:
        theirs = run_theirs(exact.to(dtype), given).float()
        assert _relative(got - reference, reference) <= 1.1 * _relative(
            theirs - reference, reference
        )
    return used


def _relative(error: Tensor, reference: Tensor) -> float:
    return float(error.double().norm() / reference.double().norm())
