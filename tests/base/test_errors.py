"""Errors cross a socket whole if they are ours, and say nothing foreign if they are not."""

from __future__ import annotations

import json
import logging

import pytest

from sgl_diffusion.base import env, errors, log
from sgl_diffusion.base.registry import Registry, suggest


def test_our_errors_survive_the_wire() -> None:
    sent = errors.RequestError("bad size", hint="Use 16.", code="invalid_size", param="size")
    got = errors.from_wire(errors.to_wire(sent))
    assert type(got) is errors.RequestError and str(got) == "bad size Use 16."
    assert (got.code, got.param) == ("invalid_size", "size")


@pytest.mark.parametrize("name", sorted(errors._tree(errors.SglError)))
def test_every_class_of_the_tree_survives(name: str) -> None:
    kind = errors._tree(errors.SglError)[name]
    got = errors.from_wire(errors.to_wire(kind("text")))
    assert type(got) is kind and got.code == kind.code
    assert name in (errors.__doc__ or ""), "the docstring shows the whole tree"


def test_foreign_text_stays_here() -> None:
    told = errors.to_wire(ValueError("/secret/path"))
    assert "/secret" not in str(told) and "ValueError" in told["message"]


def test_a_wrong_environment_value_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLD_DEBUG", "maybe")
    with pytest.raises(errors.ConfigError, match="SGLD_DEBUG='maybe'"):
        env.get("SGLD_DEBUG")
    monkeypatch.setenv("SGLD_DEBUG", "1")
    assert env.get("SGLD_DEBUG") is True


def test_a_registry_suggests_and_refuses_doubles() -> None:
    registry: Registry[int] = Registry("thing", {"alpha": 1})
    with pytest.raises(errors.ConfigError, match="no thing 'alpah'.*Did you mean 'alpha'"):
        registry.get("alpah")
    with pytest.raises(errors.ConfigError, match="Known: alpha"):
        registry.get("zzz")
    with pytest.raises(AssertionError):
        registry.add("alpha", 2)


def test_a_log_record_stays_one_line() -> None:
    record = logging.LogRecord("n", logging.INFO, "", 0, "a\nb \x1b[31m %s", ("c\r",), None)
    line = log._OneLine().format(record)
    assert "\n" not in line and "\\n" in line and "\\x1b" in line and "\\r" in line


def test_the_lines_of_a_traceback_are_no_records() -> None:
    try:
        raise ValueError("x\n12:00:00 E forged: line")
    except ValueError as error:
        info = (type(error), error, error.__traceback__)
    record = logging.LogRecord("n", logging.ERROR, "", 0, "failed", (), info)
    first, *trace = log._OneLine().format(record).split("\n")
    assert first.endswith("E n: failed") and trace
    assert all(line.startswith("    | ") for line in trace)


def test_a_record_as_json_is_one_line_with_its_fields():
    record = logging.LogRecord("a.b", logging.INFO, "", 0, "x\n\x1b[31m %s", ("y",), None)
    record.fields = {"status": 200, "prompt": "sha256:1 \r\n"}
    line = log._Json().format(record)
    assert "\n" not in line and "\x1b" not in line
    event = json.loads(line)
    assert event["event"] == "x\n\x1b[31m y" and event["status"] == 200
    assert event["level"] == "info" and event["time"].endswith("Z")


def test_a_word_of_one_name_suggests_that_name() -> None:
    names = ["num_inference_steps", "style", "guidance_scale", "true_cfg_scale"]
    assert suggest("steps", names) == "Did you mean 'num_inference_steps'?"
    assert suggest("guidence_scale", names) == "Did you mean 'guidance_scale'?"


def test_a_library_that_a_worker_misses_is_named_with_a_next_step():
    told = errors.to_wire(ModuleNotFoundError("No module named 'x' at /secret", name="x"))
    assert told["message"] == "The worker cannot load x." and "sglang doctor" in told["hint"]
    assert "secret" not in str(errors.to_wire(ImportError("/secret/lib.so: undefined symbol")))
