"""Options: merging, origins, and errors that name the option."""

from __future__ import annotations

import pytest

from sgl_diffusion.base.config import EngineOptions, ServeOptions
from sgl_diffusion.base.errors import ConfigError
from sgl_diffusion.base.options import resolve


def test_later_sources_win_and_the_origin_is_kept() -> None:
    made = resolve(ServeOptions, [("file a.toml", {"port": 1, "host": "h"}), ("flag", {"port": 2})])
    assert (made.value.port, made.value.host) == (2, "h")
    assert made.origins["port"] == "flag" and made.origins["host"] == "file a.toml"
    assert made.origins["num_gpus"] == "default"
    assert "port = 2  (flag)" in made.lines()


def test_hyphens_and_underscores_are_one_spelling() -> None:
    assert resolve(EngineOptions, [("f", {"dit-precision": "bf16"})]).value.dit_precision == "bf16"


def test_a_whole_number_is_taken_for_seconds() -> None:
    value = resolve(ServeOptions, [("f", {"drain_timeout": 5})]).value.drain_timeout
    assert value == 5.0 and isinstance(value, float)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"prot": 1}, "Did you mean 'port'"),
        ({"port": "80"}, "port must be int"),
        ({"port": True}, "port must be int"),
        ({"port": None}, "port must be int"),
        ({"dit_precision": "fp8"}, "Use one of: auto, fp32, bf16, fp16"),
        ({"model_path": 5}, "model_path must be str"),
        ({"max_batch_rows": 0}, "max_batch_rows is 0 in file x; it must be at least 1"),
        ({"drain_timeout": float("nan")}, "drain_timeout is not a finite number in file x"),
    ],
)
def test_a_wrong_value_is_an_error_that_helps(values: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        resolve(ServeOptions, [("file x", values)])


def test_every_option_has_a_sentence_of_help() -> None:
    import dataclasses

    for field in dataclasses.fields(ServeOptions):
        assert field.metadata["help"].endswith("."), field.name
