"""What callers may say about adapters."""

from __future__ import annotations

import math

import pytest

from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.base.lora import LoraSetting, LoraUse, check_uses, line_up_settings


def test_scalars_are_shared_and_lists_are_in_order():
    assert line_up_settings(lora_nickname="a", lora_path="a.safetensors") == (
        LoraSetting(nickname="a", path="a.safetensors"),
    )
    assert line_up_settings(
        lora_nickname=["a", "b"],
        lora_path=["x", None],
        target="transformer",
        strength=[0.5, -1],
        lora_alpha=[None, 7.5],
    ) == (
        LoraSetting(nickname="a", path="x", target="transformer", strength=0.5),
        LoraSetting(nickname="b", target="transformer", strength=-1, alpha=7.5),
    )


@pytest.mark.parametrize(
    ("given", "param", "text"),
    [
        ({"lora_path": "x"}, "lora_path", "lora_nickname has 2 items, but lora_path has 1 item."),
        ({"lora_path": ["x"] * 3}, "lora_path", "2 items, but lora_path has 3 items"),
        ({"target": ["all"]}, "target", "2 items, but target has 1 item"),
        ({"strength": [1.0, 2.0, 3.0]}, "strength", "2 items, but strength has 3 items"),
        ({"lora_alpha": 4.0}, "lora_alpha", "2 items, but lora_alpha has 1 item"),
    ],
)
def test_a_mismatch_says_which_list_has_how_many(given, param, text):
    with pytest.raises(RequestError, match=text) as caught:
        line_up_settings(lora_nickname=["a", "b"], **given)
    assert (caught.value.code, caught.value.param) == ("mismatched_lengths", param)


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ({"target": "vae"}, "invalid_target"),
        ({"strength": math.nan}, "not_finite"),
        ({"strength": 1e9}, "out_of_range"),
        ({"lora_alpha": 0.0}, "out_of_range"),
        ({"lora_alpha": math.inf}, "not_finite"),
        ({"lora_nickname": "../x"}, "invalid_value"),
        ({"lora_nickname": "n" * 10_000}, "invalid_value"),
        ({"lora_nickname": ["a", "a"]}, "lora_twice"),
        ({"lora_nickname": []}, "out_of_range"),
        ({"lora_nickname": ["a", "a"], "target": ["all", "transformer_2"]}, "lora_twice"),
        ({"lora_path": " "}, "lora_path_not_allowed"),
        ({"lora_path": "a\0b"}, "lora_path_not_allowed"),
        ({"lora_weight_name": " "}, "invalid_value"),
        ({"lora_revision": "../../x"}, "invalid_value"),
        ({"lora_revision": "/etc"}, "invalid_value"),
        ({"lora_revision": "v1\n"}, "invalid_value"),
        ({"lora_revision": "v" * 201}, "invalid_value"),
    ],
)
def test_what_cannot_be_meant(given, code):
    with pytest.raises(RequestError) as caught:
        line_up_settings(**{"lora_nickname": "a", **given})
    assert caught.value.code == code


def test_one_adapter_may_have_a_strength_for_each_expert():
    settings = line_up_settings(
        lora_nickname=["a", "a"], target=["transformer", "transformer_2"], strength=[1.0, 0.5]
    )
    assert [setting.strength for setting in settings] == [1.0, 0.5]


@pytest.mark.parametrize(
    ("uses", "code"),
    [
        ([LoraUse(nickname="a"), LoraUse(nickname="a", strength=2)], "lora_twice"),
        ([LoraUse(nickname="a", strength=math.inf)], "not_finite"),
        ([LoraUse(nickname="a", strength=-101)], "out_of_range"),
        ([LoraUse(nickname=f"a{i}") for i in range(17)], "out_of_range"),
        ([LoraUse(nickname="a", path="")], "lora_path_not_allowed"),
        ([LoraUse(nickname="a", alpha=0.0)], "out_of_range"),
        ([LoraUse(nickname="a", alpha=math.nan)], "not_finite"),
        ([LoraUse(nickname="a", weight_name="\0")], "invalid_value"),
        ([LoraUse(nickname="a", revision="a..b")], "invalid_value"),
    ],
)
def test_adapters_of_a_request(uses, code):
    with pytest.raises(RequestError) as caught:
        check_uses(uses)
    assert (caught.value.code, caught.value.param) == (code, "lora")


@pytest.mark.parametrize("revision", ["main", "v1.0.2", "refs/pr/12", "feature/a-b_c", "e" * 40])
def test_revisions_of_a_hub(revision):
    check_uses([LoraUse(nickname="a", path="org/name", revision=revision)])
    (setting,) = line_up_settings(lora_nickname="a", lora_path="o/n", lora_revision=revision)
    assert setting.revision == revision
