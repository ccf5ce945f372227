"""Module names of checkpoints, there and back."""

from __future__ import annotations

import pytest

from sgl_diffusion.loader.rules import Rule, Rules, Target
from sgl_diffusion.models.wan_weights import RULES as WAN

CASES = [
    ("blocks.3.attn1.to_k", Target("blocks.3.attn1.to_qkv", "k")),
    ("blocks.11.attn2.to_v", Target("blocks.11.attn2.to_kv", "v")),
    ("blocks.0.attn2.to_q", Target("blocks.0.attn2.to_q")),
    ("blocks.0.attn1.to_out.0", Target("blocks.0.attn1.to_out")),
    ("blocks.7.ffn.net.0.proj", Target("blocks.7.ffn.linear_1")),
    ("condition_embedder.text_embedder.linear_2", Target("text_embedder.linear_2")),
    ("patch_embedding", Target("patch_embedding", flatten=True)),
    ("proj_out", Target("proj_out")),
    ("", Target("")),
]


@pytest.mark.parametrize(("source", "target"), CASES)
def test_names_go_there_and_back(source: str, target: Target) -> None:
    assert WAN.target(source) == target
    assert WAN.source(target.module, target.segment) == source


def test_an_ignored_module_goes_nowhere() -> None:
    assert WAN.target("blocks.5.attn2.norm_added_q") is None


def test_a_placeholder_matches_one_part_of_a_name() -> None:
    rules = Rules(Rule("a.{x}.c", "b.{x}"))
    assert rules.target("a.1.c") == Target("b.1")
    assert rules.target("a.1.2.c") == Target("a.1.2.c")
    assert rules.target("a.1.cc") == Target("a.1.cc")
