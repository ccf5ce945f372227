"""/openapi.json: made from the models that check the requests, and from the table of routes.

Bodies are read by hand (forms, large files, our own texts), so the framework cannot see them.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.responses import JSONResponse

from sgl_diffusion import __version__
from sgl_diffusion.base.checks import MAX_OUTPUTS, MAX_PROMPT_CHARS, MAX_SEED
from sgl_diffusion.base.lora import TARGETS
from sgl_diffusion.base.params import MAX_STEPS
from sgl_diffusion.server.context import Context
from sgl_diffusion.server.operations import FORM, JSON, OPERATIONS, REFUSED, Operation, Schema
from sgl_diffusion.server.schemas import answers
from sgl_diffusion.server.schemas.common import REASONS
from sgl_diffusion.server.schemas.lora import NICKNAME
from sgl_diffusion.server.validate import CONTAINERS, SPELLINGS, RequestBody

router = APIRouter()

# Rules that the served model or our own texts check later than the types of the request models.
_NARROWER: dict[str, Schema] = {
    "prompt": {"minLength": 1, "maxLength": MAX_PROMPT_CHARS},
    "negative_prompt": {"maxLength": MAX_PROMPT_CHARS},
    "n": {"minimum": 1, "maximum": MAX_OUTPUTS},
    "num_inference_steps": {"minimum": 1, "maximum": MAX_STEPS},
    "guidance_scale": {"minimum": -100, "maximum": 100},
    "true_cfg_scale": {"minimum": -100, "maximum": 100},
    "guidance_scale_2": {"minimum": -100, "maximum": 100},
    "guidance_start": {"minimum": 0, "maximum": 1},
    "guidance_stop": {"minimum": 0, "maximum": 1},
    "cfg_gate_step": {"minimum": 0, "maximum": 1},
    "teacache_threshold": {"minimum": 0.001, "maximum": 1},
    "flow_shift": {"minimum": 0.01, "maximum": 100},
    "max_sequence_length": {"minimum": 1},
    "num_frames": {"minimum": 1},
    "seed": {"minimum": 0, "maximum": MAX_SEED},
    "size": {"pattern": "^([1-9][0-9]{0,4}x[1-9][0-9]{0,4}|auto|)$"},
    "lora_nickname": {"pattern": NICKNAME},
    "target": {"pattern": f"^({'|'.join(TARGETS)})$"},
    "seconds": {"minimum": 1, "maximum": 3600, "pattern": "^0{0,4}[1-9][0-9]{0,3}$"},
}
# The model makes opaque pictures only: what a request may say, and what the field takes to refuse.
_OPAQUE: Schema = {"type": "string", "enum": ["auto", "opaque"]}
# Fields whose types only our own code knows, or whose values nobody serves.
_PICTURE: Schema = {"type": "string", "description": "URL or data URL of a picture."}
_OTHER: dict[str, Schema] = {
    "background": _OPAQUE,
    "input_reference": {
        "anyOf": [
            _PICTURE,
            {
                "type": "object",
                "properties": {"image_url": _PICTURE},
                "required": ["image_url"],
                "additionalProperties": False,
            },
        ]
    },
}
_FILE: Schema = {"type": "string", "format": "binary"}
_FORM_FIELDS: dict[str, Schema] = {
    "background": _OPAQUE,
    "image": {"anyOf": [{"type": "array", "items": _FILE, "minItems": 1}]},
    "input_reference": _FILE,
    "lora": {"type": "string", "contentMediaType": "application/json"},
    "mask": _FILE,
    "url": {"anyOf": [{"type": "array", "items": _PICTURE, "minItems": 1}]},
}


@dataclass(frozen=True, kw_only=True)
class Surface:
    """What an app serves. `narrower` are rules that the served model or our own texts check later
    than the types of the request models, `other` and `form` whole schemas of fields in JSON and in
    forms; `together` says of a request model, by name, what its fields say of each other. Routes
    in `refused` never succeed."""

    title: str
    operations: Mapping[str, Operation]
    refused: Set[str] = frozenset()
    narrower: Mapping[str, Schema] = field(default_factory=dict)
    other: Mapping[str, Schema] = field(default_factory=dict)
    form: Mapping[str, Schema] = field(default_factory=dict)
    together: Mapping[str, Sequence[Schema]] = field(default_factory=dict)


PICTURES = Surface(
    title="sgl_diffusion",
    operations=OPERATIONS,
    refused=REFUSED,
    narrower=_NARROWER,
    other=_OTHER,
    form=_FORM_FIELDS,
)


@router.get("/openapi.json")
async def openapi(context: Context) -> JSONResponse:
    return JSONResponse(document(secured=context.settings.keys.required))


def path_of(route_path: str) -> str:
    return re.sub(r"\{(\w+):path\}", r"{\1}", route_path)


def document(surface: Surface = PICTURES, *, secured: bool) -> dict[str, Any]:
    components: dict[str, Any] = {}
    paths: dict[str, Any] = {}
    for key, row in surface.operations.items():
        method, _, path = key.partition(" ")
        described = _operation(surface, key, row, components, secured)
        paths.setdefault(path, {})[method.lower()] = described
    found: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": surface.title, "version": __version__},
        "paths": paths,
        "components": {"schemas": components},
    }
    if secured:
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return found


def _operation(
    surface: Surface, key: str, row: Operation, components: dict[str, Any], secured: bool
) -> dict[str, Any]:
    path = key.partition(" ")[2]
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"\{(\w+)\}", path)
    ]
    parameters += [{"name": name, "in": "query", "schema": schema} for name, schema in row.query]
    described: dict[str, Any] = {
        "summary": row.summary,
        "operationId": re.sub(r"\W+", "_", key).strip("_").lower(),
        "parameters": parameters,
        "responses": _responses(row, components, refused=key in surface.refused),
    }
    if row.request is not None:
        content = {
            kind: {"schema": _request(surface, row.request, components, form=kind == FORM)}
            for kind in row.kinds
        }
        described["requestBody"] = {"required": True, "content": content}
    if secured and not row.public:
        described["security"] = [{"key": []}]
    return described


def _responses(row: Operation, components: dict[str, Any], *, refused: bool) -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": _answer(answers.Error, components)}}}
    codes = {403, 429, 431, 500, 503, *row.errors} | (set() if row.public else {401})
    codes |= {400, 413, 415} if row.request is not None else set()
    responses: dict[str, Any] = {}
    if not refused:
        schema = _BYTES
        if isinstance(row.answer, dict):
            schema = row.answer
        elif row.answer is not None:
            schema = {"$ref": _answer(row.answer, components)}
        schemas = {JSON: schema, "text/event-stream": _EVENT}
        content = {kind: {"schema": schemas.get(kind, _BYTES)} for kind in row.media}
        responses["200"] = {"description": row.summary, "content": content}
    for code in sorted(codes):
        responses[str(code)] = {"description": "An error; see docs/api.md.", "content": error}
    return responses


def _answer(kind: type[BaseModel], components: dict[str, Any]) -> str:
    return _add(kind.__name__, kind.model_json_schema(ref_template=_REF), components)


_BYTES: Schema = {"type": "string"}
# What is said of a stream is said of each of its events.
_EVENT: Schema = {
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}
_REF = "#/components/schemas/{model}"


def _add(name: str, schema: Schema, components: dict[str, Any]) -> str:
    components.update(schema.pop("$defs", {}))
    components[name] = schema
    return _REF.format(model=name)


def _request(
    surface: Surface, kind: type[RequestBody], components: dict[str, Any], *, form: bool = False
) -> Schema:
    """The fields of a request model, those accepted at neutral values, and the containers.

    A form says "not given" by leaving a field out: it knows no null."""
    schema = kind.model_json_schema(ref_template=_REF)
    properties, required = schema["properties"], schema.get("required", [])
    other = surface.form if form else surface.other
    for name in set(properties) & set(other):
        properties[name] = copy.deepcopy(other[name]) | _described(properties[name])
    for name, found in properties.items():
        _narrow(found, surface.narrower.get(name, {}))
        if name not in required:
            properties[name] = _without_null(found) if form else _nullable(found)
    for name, values in kind.neutral.items():
        if values or not form:
            said = REASONS.get(name, "It changes nothing")
            properties[name] = {
                "enum": [*values] if form else [*values, None],
                "description": f"{said}: accepted as listed, refused otherwise.",
            }
    for spelling, name in SPELLINGS.items():
        if name in properties:
            properties[spelling] = properties[name]
    rules = list(surface.together.get(kind.__name__, ()))
    if form:
        rules += [{"not": {"required": names}} for names in _spread_lists(properties)]
        if "image" in properties:
            ways = ("image", "image[]", "url", "url[]")
            schema["anyOf"] = [{"required": [name]} for name in ways]
    if rules:
        schema["allOf"] = rules
    # The top level wins over what they hold, so no schema can say what is wrong inside.
    for container in CONTAINERS:
        properties[container] = {"type": "object"} if form else {"type": ["object", "null"]}
    schema["additionalProperties"] = False
    return {"$ref": _add(kind.__name__ + ("Form" if form else ""), schema, components)}


def _described(schema: Schema) -> Schema:
    return {name: schema[name] for name in ("description", "default") if name in schema}


def _spread_lists(properties: dict[str, Schema]) -> list[list[str]]:
    """A form repeats `name[]` for the items of a list. Returns the pairs of names of which a form
    has one: a number, or a list of them."""
    pairs = []
    for name, found in list(properties.items()):
        branches = found.get("anyOf", [])
        lists = [branch for branch in branches if branch.get("type") == "array"]
        if lists:
            rest = [branch for branch in branches if branch not in lists]
            properties[name] = {**found, "anyOf": rest or lists}
            properties[f"{name}[]"] = lists[0]
            if rest:
                pairs.append([name, f"{name}[]"])
    return pairs


def _narrow(schema: Schema, rules: Schema) -> None:
    """Add `rules` to each branch that they speak about."""
    texts = {"minLength", "maxLength", "pattern"}
    for branch in schema.get("anyOf", [schema]):
        kind = branch.get("type")
        if kind == "string":
            branch.update({name: rule for name, rule in rules.items() if name in texts})
        elif kind in ("integer", "number"):
            branch.update({name: rule for name, rule in rules.items() if name not in texts})
        elif kind == "array":
            _narrow(branch["items"], rules)


def _without_null(schema: Schema) -> Schema:
    branches = [each for each in schema.get("anyOf", []) if each.get("type") != "null"]
    return {**schema, "anyOf": branches} if branches else schema


def _nullable(schema: Schema) -> Schema:
    if any(branch.get("type") == "null" for branch in schema.get("anyOf", [])):
        return schema
    said = _described(schema)
    bare = {name: value for name, value in schema.items() if name not in said}
    return {"anyOf": [bare, {"type": "null"}], **said}
