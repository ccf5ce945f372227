"""/openapi.json of an omni server is true: schemathesis sends what it allows and forbids."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import schemathesis
from schemathesis.checks import CHECKS, load_all_checks

from sgl_diffusion.server.omni.app import ROUTERS
from sgl_diffusion.server.omni.openapi import OMNI, OPERATIONS
from sgl_diffusion.server.openapi import document, path_of
from sgl_diffusion.server.schemas import chat_answers
from sgl_diffusion.server.validate import CONTAINERS
from tests.server.omni.conftest import OmniApi
from tests.server.test_openapi import explore_one

# Rules that JSON Schema cannot write: the served model, the outside world.
BEYOND_SCHEMA = {
    "context_length_exceeded", "control_token", "file_expected",
    "input_empty", "invalid_audio", "invalid_data_url", "invalid_image", "invalid_video",
    "local_path_not_allowed", "model_not_found", "too_many_media", "unsupported_url_scheme",
    "url_not_allowed", "voice_not_found", "missing_message", "request_too_large",
    "too_many_parts", "unsupported_format",
}  # fmt: skip
pytestmark = pytest.mark.timeout(1800)


def test_every_route_is_described() -> None:
    served = {
        f"{method} {path_of(route.path)}"
        for router in ROUTERS
        for route in router.routes
        if route.include_in_schema
        for method in route.methods - {"HEAD"}
    }
    assert set(OPERATIONS) == served


def test_the_document_is_served(omni: OmniApi) -> None:
    told = omni.http.get("/openapi.json").json()
    assert told == document(OMNI, secured=False)
    assert "ImageRequest" not in told["components"]["schemas"]
    assert '"allOf": []' not in json.dumps(told)


def test_answers_have_the_fields_that_are_described(omni: OmniApi) -> None:
    chat = omni.chat(max_tokens=3, logprobs=True)
    spoken = omni.chat(max_tokens=3, modalities=["text", "audio"], talker_max_new_tokens=3)
    models = omni.http.get("/v1/models").json()
    for kind, answer in (
        (chat_answers.ChatCompletion, chat.json()),
        (chat_answers.ChatCompletion, spoken.json()),
        (chat_answers.OmniModels, models),
        (chat_answers.OmniModel, models["data"][0]),
        (chat_answers.Voices, omni.http.get("/v1/audio/voices").json()),
    ):
        kind.model_validate(answer, strict=True)
        assert set(answer) <= set(kind.model_fields), kind


@pytest.fixture(scope="module")
def short(tiny_qwen3_omni: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OmniApi]:
    """Answers of a few tokens, and nothing outside."""
    api = OmniApi(
        tiny_qwen3_omni,
        tmp_path_factory.mktemp("short"),
        max_sequence_length=48,
        media_urls="off",
        speech=False,
    )
    yield api
    api.close()


def counts(check, case, response) -> bool:  # type: ignore[no-untyped-def]
    """Whether a refusal can be held against the schema."""
    if check.__name__ != "positive_data_acceptance" or response.status_code < 400:
        return True
    if isinstance(case.body, dict) and set(case.body) & set(CONTAINERS):
        return False
    error = response.json()["error"]
    if error["code"] == "unsupported_parameter":  # what the served model cannot do
        return "qwen3-omni" not in error["message"]
    return error["code"] not in BEYOND_SCHEMA


def explore(api: OmniApi, examples: int, seed: int = 0) -> None:
    load_all_checks()
    checks = CHECKS.get_by_names(CHECKS.get_all_names())
    failures: list[str] = []
    schema = schemathesis.openapi.from_url(f"{api.url}/openapi.json")
    for found in schema.get_all_operations():
        for mode in schemathesis.GenerationMode:
            failures += explore_one(
                found.ok(), mode, checks, examples, headers={}, counts=counts, seed=seed
            )
    assert not failures, "\n\n".join(failures[:12])


def test_schemathesis(short: OmniApi) -> None:
    explore(short, 6)
    short.wait_until("all over", lambda: short.unfinished() == 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_schemathesis_at_length(short: OmniApi, seed: int) -> None:
    explore(short, 300, seed)
