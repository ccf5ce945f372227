"""The scale that a training configuration sets, and what in it is refused."""

from __future__ import annotations

import json
import time

import pytest

from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.loader.adapters.config import Config, read_config, read_header


def test_no_configuration_is_scale_one() -> None:
    assert Config().scale(Config().alpha_of("a"), 16) == 1
    assert Config().scale(4.5, 16) == 4.5 / 16
    assert Config(rank_stabilised=True).scale(4.5, 16) == 4.5 / 4
    assert Config().scale(4.5, 0) == 1


@pytest.mark.parametrize(
    ("pattern", "layer", "matches"),
    [
        ("to_q", "blocks.0.attn1.to_q", True),
        ("to_q", "blocks.0.attn1.not_to_q", False),
        ("to_q", "blocks.0.to_q.0", False),
        ("^blocks.0.to_q", "blocks.0.to_q", True),
        (r"blocks\.\d+\.to_(q|k)", "blocks.11.to_k", True),
        (r"blocks\.[0-9]+\.to_(q|k)", "blocks.11.to_v", False),
        (r".*\.to_v$", "blocks.11.to_v", True),
    ],
)
def test_patterns(pattern: str, layer: str, matches: bool) -> None:
    config = read_config({"lora_alpha": 1, "alpha_pattern": {pattern: 7.5}})
    assert config.alpha_of(layer) == (7.5 if matches else 1)


@pytest.mark.parametrize(
    "pattern", ["(a+)+b", "(.*)*", "a{1,900}", "(?=a)", "[a-z]*", "(", ".*" * 9]
)
def test_patterns_that_could_run_for_long_are_refused(pattern: str) -> None:
    with pytest.raises(RequestError, match="alpha_pattern"):
        read_config({"alpha_pattern": {pattern: 1}})


def test_the_slowest_pattern_is_quick() -> None:
    config = read_config({"alpha_pattern": {".*a.*a.*a": 1}})
    start = time.perf_counter()
    assert config.alpha_of("a" * 200 + "b") is None
    assert time.perf_counter() - start < 2


def test_header() -> None:
    values = {"transformer.lora_alpha": 2.5, "transformer.r": 4, "text_encoder.lora_alpha": 8}
    configs = read_header({"lora_adapter_metadata": json.dumps(values)})
    assert {name: config.alpha for name, config in configs.items()} == {
        "transformer": 2.5,
        "text_encoder": 8,
    }
    assert read_header({"lora_adapter_metadata": '{"lora_alpha": 3}'})[""].alpha == 3
    assert read_header({"ss_network_alpha": "1"}) == {}


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"a.lora_alpha": "x"}'])
def test_a_damaged_header(text: str) -> None:
    with pytest.raises(RequestError, match="damaged"):
        read_header({"lora_adapter_metadata": text})


@pytest.mark.parametrize(
    "values",
    [
        {"peft_type": "VERA"},
        {"modules_to_save": ["a"]},
        {"layer_replication": [[0, 1]]},
        {"fan_in_fan_out": True},
        {"alora_invocation_tokens": [1]},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "OLoRA"},
    ],
)
def test_refused_by_name(values: dict[str, object]) -> None:
    with pytest.raises(RequestError, match="not supported") as caught:
        read_config(values)
    (name, value), *_ = values.items()
    assert str(value) in caught.value.message or name in caught.value.message


def test_neutral_values_pass() -> None:
    values = {"modules_to_save": None, "init_lora_weights": "gaussian", "peft_type": "LORA"}
    assert read_config({**values, "lora_alpha": 4}).alpha == 4
    with pytest.raises(RequestError, match="lora_alpha"):
        read_config({"lora_alpha": float("nan")})
