"""What a fresh transformer of the small model knows in pure noise: where its tokens are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from examples.train_demo.beginning import SAID
from examples.train_demo.models import PADDED, TEXT_WIDTH, make_transformer
from examples.train_demo.ruler import Room


def _after_the_ruler(shape: tuple[int, int, int], said: tuple[float, ...]) -> Tensor:
    """[3 noises, frames, rows, columns, width]: what the second block leaves."""
    transformer, found = make_transformer().eval(), []
    transformer.blocks[1].register_forward_hook(lambda _block, _given, out: found.append(out))
    text = torch.randn(3, PADDED, TEXT_WIDTH)
    text[:, :, : len(SAID)] = torch.tensor(said)
    text[:, 9:] = 0.0
    frames, rows, columns = shape
    with torch.no_grad():
        transformer(
            torch.randn(3, 16, frames, 2 * rows, 2 * columns), torch.full((3,), 1000.0), text
        )
    return found[0].unflatten(1, shape)


def _away(shape: tuple[int, int, int], said: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """How far every token takes itself to be from the middle of the shape."""
    numbers = _after_the_ruler(shape, said)
    at = Room(make_transformer()).away
    return numbers[..., at], numbers[..., at + 1]


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 6, 8), (1, 12, 12), (5, 8, 6)])
def test_tokens_of_noise_know_where_they_are(shape: tuple[int, int, int]) -> None:
    across, along = _away(shape, (0.0, 0.0, 0.0, 0.0, 0.0))
    for far, axis in ((along, 2), (across, 3)):
        line = far.movedim(axis, -1).flatten(0, -2)
        mean = line.mean(dim=0)
        assert (mean.diff() > 0).all()
        torch.testing.assert_close(mean, -mean.flip(0), atol=0.5, rtol=0.0)
        assert line.std(dim=0).max() < 0.4 * float(mean[-1])


def test_what_the_text_says_of_the_place_is_the_middle() -> None:
    across, along = (far.mean(dim=(0, 1)) for far in _away((1, 8, 8), (-1.0, 1.0, 0.0, 0.0, 0.0)))
    # A quarter of the picture from the left, and a quarter from its lower end.
    assert across[:, :2].max() < 0 < across[:, 2:].min()
    assert along[:6].max() < 0 < along[6:].min()


def test_a_shape_that_moves_is_elsewhere_in_the_end() -> None:
    moved = _away((9, 8, 8), (0.0, 0.0, 0.0, 1.0, 0.0))
    across, along = (far.mean(dim=(0, 2)) for far in moved)
    # To the right of a shape that begins on the left, to the left of one that has gone right.
    assert across[0, 3:].min() > 0 > across[-1, :5].max()
    torch.testing.assert_close(along[0], along[-1], atol=0.5, rtol=0.0)
