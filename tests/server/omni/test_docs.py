"""docs/omni.md says what the schemas say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sgl_diffusion.server.omni.app import routes
from sgl_diffusion.server.schemas.chat import ChatRequest, SpeechRequest, TranscriptionRequest
from sgl_diffusion.server.validate import RequestBody
from tests.server.test_reliability_page import missing

PAGE = (Path(__file__).parents[3] / "docs/omni.md").read_text()


def section(title: str) -> str:
    return PAGE.partition(f"## {title}\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize(
    ("title", "kind"),
    [("Chat", ChatRequest), ("Speech", SpeechRequest), ("Transcriptions", TranscriptionRequest)],
)
def test_fields(title: str, kind: type[RequestBody]) -> None:
    cells = re.findall(r"^\| (`[^|]*) \|", section(title), re.M)
    documented = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    assert documented == set(kind.model_fields)


def test_routes() -> None:
    documented = set(re.findall(r"`(GET|POST) (/[^`]*)`", section("Routes")))
    served = {
        (method, re.sub(r"\{.*\}", "{id}", route.path))
        for route in routes()
        for method in (route.methods or set()) - {"HEAD"}
    }
    assert documented == served


def test_every_promise_is_shown_by_something_that_is_there() -> None:
    rows = re.findall(r"^\| (.*) \| (`.*`) \|$", section("What shows it"), re.M)
    assert len(rows) > 20
    for promise, names in rows:
        assert not [why for name in re.findall(r"`([^`]+)`", names) if (why := missing(name))], (
            promise
        )


# What clients of OpenAI, of sglang-omni and of vLLM-Omni send, from their published references.
CHAT = """
audio audios frequency_penalty function_call functions image_generation images logit_bias logprobs
max_completion_tokens max_tokens messages metadata min_p modalities model n parallel_tool_calls
prediction presence_penalty prompt_cache_key reasoning_effort repetition_penalty request_id
response_format safety_identifier seed service_tier stage_params stage_sampling stop store stream
stream_options talker_max_new_tokens talker_repetition_penalty talker_temperature talker_top_k
talker_top_p temperature tool_choice tools top_k top_logprobs top_p use_audio_in_video user
verbosity video_fps video_max_frames video_max_pixels video_min_pixels video_total_pixels videos
web_search_options
"""
SPEECH = """
duration_tokens initial_codec_chunk_frames input instructions language max_new_tokens model
ref_audio ref_text references repetition_penalty response_format seed speaker speed stage_params
stream stream_codec_output stream_format suppress_bootstrap_silence task_type temperature
token_count top_k top_p voice x_vector_only_mode
"""


@pytest.mark.parametrize(("kind", "names"), [(ChatRequest, CHAT), (SpeechRequest, SPEECH)])
def test_every_field_of_other_clients_is_known(kind: type[RequestBody], names: str) -> None:
    assert not set(names.split()) - set(kind.model_fields) - set(kind.neutral)
