"""Groups share time: simulated, with units of known length."""

from __future__ import annotations

from dataclasses import dataclass

from sgl_diffusion.engine.turns import Turns


@dataclass(frozen=True)
class Taker:
    order: int
    weight: float = 1.0


def serve(
    turns: Turns, takers: dict[str, Taker], seconds: dict[str, float], count: int
) -> list[str]:
    served = []
    for _ in range(count):
        name = turns.next(takers)
        turns.spent(name, seconds[name], takers[name].weight)
        served.append(name)
    return served


LENGTHS = {"video": 10.0, "image": 1.0, "other": 1.0}
BOTH = {"video": Taker(0), "image": Taker(1)}


def test_groups_get_equal_time_however_long_their_units_are() -> None:
    served = serve(Turns(), BOTH, LENGTHS, 110)
    assert served.count("video") == 10 and served.count("image") == 100


def test_weight_is_a_share_of_the_time() -> None:
    takers = {"video": Taker(0, 1.0), "image": Taker(1, 4.0)}
    served = serve(Turns(), takers, LENGTHS, 410)
    assert 9 <= served.count("video") <= 11


def test_a_newcomer_waits_for_the_unit_under_way_and_is_done_before_the_next() -> None:
    turns = Turns()
    serve(turns, {"video": BOTH["video"]}, LENGTHS, 7)
    assert serve(turns, BOTH, LENGTHS, 10) == ["image"] * 10
    assert serve(turns, BOTH, LENGTHS, 1) == ["video"]


def test_coming_back_again_and_again_takes_no_more_than_a_fair_share() -> None:
    turns = Turns()
    serve(turns, {"video": BOTH["video"]}, LENGTHS, 3)
    served = []
    for _ in range(100):
        served += serve(turns, BOTH, LENGTHS, 5)
        served += serve(turns, {"video": BOTH["video"]}, LENGTHS, 0)
        turns.next({"video": BOTH["video"]})  # the image is done, another one comes
    video, image = served.count("video") * 10.0, served.count("image") * 1.0
    assert image <= video + 10.0 and video > 100


def test_who_is_at_work_elsewhere_has_not_left() -> None:
    """The video's unit is under way in a lane, from one turn of the image to the next."""
    turns = Turns()
    served = []
    for _ in range(50):
        name = turns.next(BOTH)
        served.append(name)
        if name == "video":
            for _ in range(5):
                turns.spent(turns.next({"image": BOTH["image"]}, {"video"}), 1.0, 1.0)
                served.append("image")
        turns.spent(name, LENGTHS[name], 1.0)
    assert 9 <= served.count("image") / served.count("video") <= 11


def test_of_equals_the_oldest_job_is_first() -> None:
    assert Turns().next({"b": Taker(2), "a": Taker(1)}) == "a"


def test_nobody_starves() -> None:
    takers = {name: Taker(order) for order, name in enumerate(LENGTHS)}
    served = serve(Turns(), takers, LENGTHS, 60)
    for start in range(0, 40, 20):
        assert set(served[start : start + 22]) == set(LENGTHS)


def test_groups_that_are_gone_are_forgotten_after_a_while() -> None:
    turns = Turns()
    for number in range(1000):
        takers = {"stays": Taker(0), f"group {number}": Taker(number + 1)}
        turns.spent(turns.next(takers), 1.0, 1.0)
    assert len(turns._clocks) <= 258
