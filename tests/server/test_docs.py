"""docs/api.md says what the schemas say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from openai.types import (
    image_edit_params,
    image_generate_params,
    video_create_params,
    video_remix_params,
)

from sgl_diffusion.server import errors, openapi, operations, schemas
from sgl_diffusion.server.app import ROUTERS
from tests.server import api_page

PAGE = api_page.PAGE.read_text()


def section(title: str) -> str:
    return re.split(r"^##+ ", PAGE.partition(f"## {title}\n")[2], maxsplit=1, flags=re.M)[0]


def test_the_tables_are_those_of_the_schema():
    found = set(re.findall(r"<!-- table: (\w+) -->", PAGE))
    assert found == set(api_page.tables(openapi.document(secured=False)))
    assert api_page.page(PAGE) == PAGE, "run python -m tests.server.api_page"


@pytest.mark.parametrize("kind", api_page.KINDS.values())
def test_no_field_is_honoured_and_neutral(kind):
    assert not set(kind.neutral) & set(kind.model_fields)


def test_routes():
    documented = {
        (method, re.sub(r"\{.*\}", "{id}", path))
        for method, path in re.findall(r"`(GET|POST|DELETE) (/[^?`]*)", PAGE)
    }
    served = {
        (method, re.sub(r"\{.*\}", "{id}", route.path))
        for router in ROUTERS
        for route in router.routes
        for method in route.methods - {"HEAD"}
    }  # fmt: skip
    assert documented == served


def test_statuses():
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \| (.*) \|$", section("Errors"), re.M)
    for status, kind, codes in rows:
        assert errors.envelope(int(status), "", "")["error"]["type"] == kind
        for code in re.findall(r"`(\w+)`", codes):
            assert errors.STATUS_BY_CODE.get(code, int(status)) == int(status)
    assert set(errors.STATUS_BY_CODE.values()) <= {int(row[0]) for row in rows}


def test_every_code_of_the_server_is_listed():
    folder = Path(errors.__file__).parent
    used = set()
    for path in [*folder.glob("*.py"), *folder.parent.glob("base/[cps]*.py")]:
        used |= set(re.findall(r'code="(\w+)"', path.read_text()))
    missing = used - set(re.findall(r"`(\w+)`", section("Errors")))
    assert not missing


def test_every_route_is_described():
    described = set(operations.OPERATIONS)
    served = {
        f"{method} {openapi.path_of(route.path)}"
        for router in ROUTERS
        for route in router.routes
        if route.include_in_schema
        for method in route.methods - {"HEAD"}
    }
    assert described == served


# What clients of OpenAI and of SGLang's diffusion server send, from their published references.
SHARED = """
attention_backend_override cache_dit_params cfg_gate_step diffusers_kwargs enable_cache_dit
enable_teacache enable_upscaling enhance_prompt flow_shift generator_device guidance_scale height
max_sequence_length model n negative_prompt num_inference_steps num_profiled_timesteps
output_compression output_quality perf_dump_path profile profile_all_stages progressive_delta
progressive_levels progressive_mode prompt quality seed size skip_softmax_params task_type
true_cfg_scale upscaling_model_path upscaling_scale user width
"""
IMAGES = """
background complexity frame_count frame_duration_ms moderation output_format partial_images
response_format safety_identifier stream style svg
"""
EDITS = "image input_fidelity markup mask num_frames url"
VIDEOS = """
enable_frame_interpolation fps frame_interpolation_exp frame_interpolation_model_path
frame_interpolation_scale guidance_scale_2 input_reference num_frames num_outputs_per_prompt
output_path reference_url seconds video_path video_reference video_url x264_preset
"""


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (schemas.ImageRequest, f"{SHARED} {IMAGES}"),
        (schemas.EditRequest, f"{SHARED} {IMAGES} {EDITS}"),
        (schemas.VideoRequest, f"{SHARED} {VIDEOS}"),
    ],
)
def test_every_field_of_other_clients_is_known(kind, fields):
    """Honoured, or accepted where it changes nothing, or refused by its name: never unknown."""
    unknown = set(fields.split()) - set(kind.model_fields) - set(kind.neutral)
    assert not unknown


@pytest.mark.parametrize(
    ("kind", "sent"),
    [
        (schemas.ImageRequest, image_generate_params.ImageGenerateParamsStreaming),
        (schemas.EditRequest, image_edit_params.ImageEditParamsStreaming),
        (schemas.VideoRequest, video_create_params.VideoCreateParams),
        (schemas.RemixRequest, video_remix_params.VideoRemixParams),
    ],
)
def test_every_argument_of_the_installed_sdk_is_known(kind, sent):
    assert sent.__annotations__.keys() <= kind.model_fields.keys() | kind.neutral.keys()
