"""What may be asked of a model that chats."""

from __future__ import annotations

import math
from typing import Any

import pytest

from sgl_diffusion.base.chat import ChatMessage, ChatParams, Part, TextSampling
from sgl_diffusion.base.errors import RequestError

HELLO = ChatMessage(role="user", parts=(Part(text="Hello"),))


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("temperature", 2.1),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("seed", -1),
        ("max_tokens", 0),
        ("stop", ("",)),
        ("stop", ("a", "b", "c", "d", "e")),
        ("top_logprobs", 21),
        ("top_logprobs", 2),
    ],
)
def test_a_wrong_value_is_refused_by_name(param: str, value: Any) -> None:
    with pytest.raises(RequestError) as told:
        TextSampling(**{param: value}).check()
    assert told.value.param == param


def test_what_makes_no_conversation_is_refused() -> None:
    wrong = {
        "n": ChatParams(messages=(HELLO,), n=17),
        "messages": ChatParams(messages=()),
        "messages.1.role": ChatParams(messages=(HELLO, ChatMessage(role="tool", parts=()))),
    }
    for param, params in wrong.items():
        with pytest.raises(RequestError) as told:
            params.check()
        assert told.value.param == param


def test_defaults_and_limits_pass() -> None:
    sampling = TextSampling(temperature=2.0, top_p=1.0, logprobs=True, top_logprobs=20)
    ChatParams(messages=(HELLO,), n=16, sampling=sampling).check()
    ChatParams(messages=(HELLO,)).check()
