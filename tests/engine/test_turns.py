from __future__ import annotations

from sgl_diffusion.engine.turns import Turns


def test_takers_alternate_however_long_one_of_them_has_work() -> None:
    turns = Turns()
    order = [turns.next({"video": 0, "image": 1}) for _ in range(6)]
    assert order == ["video", "image"] * 3


def test_a_newcomer_goes_first_and_among_newcomers_the_oldest_job() -> None:
    turns = Turns()
    assert turns.next({"a": 0}) == "a"
    assert turns.next({"a": 0, "c": 2, "b": 1}) == "b"
    assert turns.next({"a": 0, "c": 2, "b": 1}) == "c"
    assert turns.next({"a": 0, "c": 2, "b": 1}) == "a"


def test_nobody_waits_longer_than_one_round() -> None:
    turns = Turns()
    takers = {name: order for order, name in enumerate("abcde")}
    served = [turns.next(takers) for _ in range(20)]
    for start in range(0, 20, 5):
        assert sorted(served[start : start + 5]) == list("abcde")


def test_a_taker_that_comes_back_is_a_newcomer() -> None:
    turns = Turns()
    turns.next({"a": 0, "b": 1})
    turns.next({"b": 1})
    assert turns.next({"a": 5, "b": 1}) == "a"
