"""How many adapters a worker knows by name, and which of them it forgets."""

from __future__ import annotations

import copy
from pathlib import Path

import msgspec
import pytest

from sgl_diffusion.base.errors import NotFoundError
from sgl_diffusion.base.lora import LoraSetting, LoraUse
from sgl_diffusion.engine.lora import nicknames
from sgl_diffusion.models.wan_weights import RULES
from tests.engine.lora.adapters import Shelf, low_rank, prepare, prepare_job
from tests.fixtures_wan import load_transformer


def named(name: str) -> LoraSetting:
    return LoraSetting(nickname=name, path=name)


def test_the_oldest_nicknames_are_forgotten_but_none_that_is_needed(
    tiny_wan_a: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, shelf = load_transformer(tiny_wan_a), Shelf()
    monkeypatch.setattr(nicknames, "MOST", 3)
    shelf.adapters |= {name: low_rank(i) for i, name in enumerate("stuvwxyz")}
    state, in_use = tmp_path / "loras.json", []
    manager = shelf.manager(model, rules=RULES, state=state, in_use=lambda: in_use)

    def known() -> list[str]:
        names = [adapter["nickname"] for adapter in manager.report()["loaded_adapters"]]
        assert sorted(msgspec.json.decode(state.read_bytes())["sources"]) == sorted(names)
        return names

    prepare(manager, named("s"))
    manager.replace([named("s")], "merge")
    manager.unmerge("all")  # it can be merged again, so it stays
    for name in "tuv":
        prepare(manager, named(name))
    assert known() == ["s", "u", "v"]
    prepare_job(manager, LoraUse(nickname="u", path="u"))
    prepare(manager, named("w"))
    assert known() == ["s", "u", "w"]
    in_use.append(manager.blend([LoraUse(nickname="u")]))
    for name in "xy":
        prepare(manager, named(name))
    assert known() == ["s", "u", "y"]
    with pytest.raises(NotFoundError):
        manager.blend([LoraUse(nickname="x")])
    in_use.clear()
    prepare(manager, named("z"))
    assert known() == ["s", "y", "z"]
    manager.merge("all", 1.0)
    fresh = shelf.manager(copy.deepcopy(model), rules=RULES, state=state)
    fresh.start([])
    assert fresh.report()["active"] == manager.report()["active"] != {}
