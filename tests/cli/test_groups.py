"""The order of `--help`."""

from __future__ import annotations

import dataclasses

import pytest

from sgl_diffusion.base.config import ServeOptions
from sgl_diffusion.cli.args import parser_for
from sgl_diffusion.cli.generate import GenerateOptions
from sgl_diffusion.cli.groups import grouped


@pytest.mark.parametrize(
    ("kind", "first", "title"),
    [(ServeOptions, "model_path", "the model"), (GenerateOptions, "prompt", "what to make")],
)
def test_every_option_stands_in_one_group(kind, first, title):
    groups = list(grouped(kind))
    assert groups[0][0] == title and groups[0][1][0].name == first
    shown = [field.name for _, fields in groups for field in fields]
    assert sorted(shown) == sorted(field.name for field in dataclasses.fields(kind))


def test_the_help_has_their_titles_and_says_defaults_plainly():
    text = parser_for(ServeOptions, "sglang serve", "Serve.").format_help()
    assert text.startswith("usage: sglang serve [options]\n")
    for title, _ in grouped(ServeOptions):
        assert f"\n{title}:\n" in text
    words = " ".join(text.split())
    assert "Default: 550." in words and "into the files. On by default." in words
    assert "Default: False" not in words and "550.0" not in words
