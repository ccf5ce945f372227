"""docs/api.md says what the schemas say."""

from __future__ import annotations

import json
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

PAGE = (Path(__file__).parents[2] / "docs/api.md").read_text()


def section(title: str) -> str:
    return re.split(r"^##+ ", PAGE.partition(f"## {title}\n")[2], maxsplit=1, flags=re.M)[0]


def names(title: str) -> set[str]:
    """The names in the first column of the tables of a section."""
    cells = re.findall(r"^\| (`[^|]*) \|", section(title), re.M)
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


def test_honoured_fields():
    titles = ("Both routes", "Images only", "Edits only", "Videos only")
    both, images, edits, videos = map(names, titles)
    assert both and images and edits and videos
    assert both | images == set(schemas.ImageRequest.model_fields)
    assert both | images | edits == set(schemas.EditRequest.model_fields)
    assert both | videos == set(schemas.VideoRequest.model_fields)


@pytest.mark.parametrize(
    ("kind", "routes"),
    [
        (schemas.ImageRequest, ("both", "images")),
        (schemas.EditRequest, ("both", "images", "edits")),
        (schemas.VideoRequest, ("both", "videos")),
    ],
)
def test_neutral_fields(kind, routes):
    rows = re.findall(
        r"^\| `(\w+)` \| (\w+) \| ?(.*?) ?\|$", section("Accepted where they change nothing"), re.M
    )
    documented = {
        name: tuple(json.loads(value) for value in re.findall(r"`([^`]+)`", accepted))
        for name, where, accepted in rows
        if where in routes
    }
    assert documented == kind.neutral


def test_routes():
    documented = set(re.findall(r"`(GET|POST|DELETE) (/[^?`]*)", PAGE))
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
    for path in [*folder.glob("*.py"), *folder.parent.glob("base/[cp]*.py")]:
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
