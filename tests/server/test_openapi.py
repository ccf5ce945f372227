"""/openapi.json is true: schemathesis sends what it allows and what it forbids."""

from __future__ import annotations

import json

import hypothesis
import pytest
import schemathesis
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.core.errors import SchemathesisError
from schemathesis.core.failures import FailureGroup

from sgl_diffusion.base.config import JobOptions
from sgl_diffusion.server import openapi
from sgl_diffusion.server.keys import Keys
from sgl_diffusion.server.schemas import answers
from sgl_diffusion.server.validate import CONTAINERS
from tests.server.conftest import listening

KEY = "user-0123456789abcdef"
BEARER = {"authorization": f"Bearer {KEY}"}
# Rules that JSON Schema cannot write: two fields at a time, the served model, the outside world.
BEYOND_SCHEMA = {
    "conflicting_parameters", "file_expected", "invalid_cursor", "invalid_data_url",
    "invalid_image", "invalid_size", "local_path_not_allowed", "mismatched_lengths",
    "model_not_found", "prompt_empty", "request_too_large", "task_not_supported",
    "invalid_mask", "too_many_images", "too_many_parts", "unsupported_image_format",
    "unsupported_url_scheme", "url_not_allowed", "lora_not_supported", "lora_twice",
    "lora_path_not_allowed",
}  # fmt: skip

# What schemathesis says of itself, where it asks its validator about a part that is a file, or
# makes a schema that is none.
BEYOND_THE_TOOL = ("Unsupported type: 'Binary'", "Invalid `allOf` definition")


def test_the_document_is_served(api):
    document = api.get("/openapi.json").json()
    assert document == openapi.document(secured=False)
    assert "security" not in json.dumps(document)
    assert '"allOf": []' not in json.dumps(document)
    assert len(json.dumps(document)) < 200_000


def test_answers_have_the_fields_that_are_described(api):
    picture = api.post("/v1/images/generations", json={"prompt": "x", "quality": "high"}).json()
    video = api.post("/v1/videos", json={"prompt": "x"}).json()
    done = api.wait_for(video["id"], "completed")
    listed = api.get("/v1/videos").json()
    kept = api.get("/v1/images").json()
    model = api.get("/v1/models").json()
    error = api.get("/nothing").json()
    for kind, answer in (
        (answers.Images, picture),
        (answers.Image, picture["data"][0]),
        (answers.KeptImages, kept),
        (answers.KeptImage, kept["data"][0]),
        (answers.Video, video),
        (answers.Video, done),
        (answers.Videos, listed),
        (answers.Model, model["data"][0]),
        (answers.Error, error),
        (answers.Deleted, api.request("DELETE", f"/v1/videos/{video['id']}").json()),
    ):
        kind.model_validate(answer, strict=True)
        assert set(answer) <= set(kind.model_fields), kind


def explore(make_api, examples: int, seed: int = 0) -> None:
    """Every check of schemathesis over every operation, with `examples` cases of each kind."""
    load_all_checks()
    api = make_api(
        keys=Keys.of([KEY]), jobs=JobOptions(max_queued_videos=10_000, max_videos_per_key=10_000)
    )
    checks = CHECKS.get_by_names(CHECKS.get_all_names())
    failures: list[str] = []
    with listening(api) as url:
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json", headers=BEARER)
        for found in schema.get_all_operations():
            for mode in schemathesis.GenerationMode:
                failures += explore_one(
                    found.ok(), mode, checks, examples, headers=BEARER, counts=counts, seed=seed
                )
    assert not failures, "\n\n".join(failures[:12])


def explore_one(operation, mode, checks, examples, *, headers, counts, seed=0) -> list[str]:
    failures: list[str] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def run(case):
        response = case.call(headers=headers, timeout=120)  # a busy machine breaks no promise
        try:
            counted = [check for check in checks if counts(check, case, response)]
            case.validate_response(response, checks=counted, headers=headers)
        except FailureGroup as error:
            failures.append(f"{operation.label} {mode.value}: {error}")

    try:
        run()
    except hypothesis.errors.Unsatisfiable:
        pass
    except (ValueError, SchemathesisError) as error:
        if not any(words in str(error) for words in BEYOND_THE_TOOL):
            raise
    return failures


def counts(check, case, response) -> bool:
    """Whether a refusal can be held against the schema."""
    if check.__name__ != "positive_data_acceptance" or response.status_code < 400:
        return True
    if isinstance(case.body, dict) and set(case.body) & set(CONTAINERS):
        return False
    error = response.json()["error"]
    if error["code"] == "out_of_range":  # the served model decides how long and how large
        return error["param"] not in ("seconds", "num_frames", "max_sequence_length")
    if error["code"] == "unsupported_parameter":  # and what it cannot do
        return "tiny" not in error["message"]
    if case.media_type == "multipart/form-data" and (error["param"] or "").startswith("lora"):
        return False  # JSON in a text, of which the schema knows that much only
    return error["code"] not in BEYOND_SCHEMA


def test_schemathesis(make_api):
    explore(make_api, 8)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(3))
def test_schemathesis_at_length(make_api, seed):
    explore(make_api, 300, seed)
