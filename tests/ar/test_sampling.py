"""What is drawn, by the rules of one answer."""

from __future__ import annotations

import pytest
import torch

from sgl_diffusion.ar.sampling import Draw
from sgl_diffusion.base.chat import TextSampling

LOGITS = torch.tensor([0.5, 3.0, -2.0, 2.9, 0.0])
LEAST = 5e-324  # a number that JSON can say, and that is zero in single precision


@pytest.mark.parametrize(
    "rules", [{"temperature": 0.0}, {"temperature": LEAST}, {"top_k": 1}, {"top_p": LEAST}]
)
def test_the_narrowest_rules_leave_the_most_likely(rules: dict[str, float]) -> None:
    sampling = TextSampling(**rules)  # type: ignore[arg-type]
    sampling.check()
    assert {Draw(sampling, seed)(LOGITS).token for seed in range(20)} == {1}
    assert Draw(sampling, 0)(LOGITS * 1e4).token == 1


def test_cuts_leave_the_likeliest() -> None:
    def drawn(**rules: float) -> set[int]:
        draw = Draw(TextSampling(**rules), 0)  # type: ignore[arg-type]
        return {draw(LOGITS).token for _ in range(300)}

    assert {0, 1, 3, 4} <= drawn()
    assert drawn(top_k=2) == drawn(top_p=0.6) == {1, 3}
    assert drawn(temperature=1e-5) == {1}
