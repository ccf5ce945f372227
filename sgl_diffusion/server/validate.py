"""From the fields of a body to a checked request: strict types, known names, our own texts."""

from __future__ import annotations

import hashlib
import json
import re
import typing
from collections.abc import Iterable
from types import UnionType
from typing import Annotated, Any, ClassVar, TypeVar

from fastapi import Request
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.base.registry import suggest
from sgl_diffusion.server.body import Body, parse_json
from sgl_diffusion.server.middleware import Notes


def whole(value: Any) -> Any:
    """2.0 as 2: JSON and its schemas know one kind of number. All else stays what it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(whole)]
# Bounded, so that arithmetic on a request can never overflow; real limits are the model's.
Int = Annotated[Whole, Field(ge=-(2**63), le=2**63 - 1)]
Edge = Annotated[Whole, Field(ge=1, le=100_000)]

CONTAINERS = ("extra_body", "extra_json", "extra_args", "extra_params")
SPELLINGS = {
    "output-quality": "output_quality",
    "output-compression": "output_compression",
}
_MAX_WARNINGS = 8
_WHOLE = re.compile(r"-?[0-9]{1,20}")
_REAL = re.compile(
    r"-?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|-?(nan|inf|infinity)", re.IGNORECASE
)
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "string": "a text",
    "bool": "true or false",
    "list": "a list",
    "dict": "an object",
    "model": "an object",
}


class RequestBody(BaseModel):
    """Fields that are honoured by `route`. `neutral` are accepted at the values listed, where they
    change nothing; any other value, and any other name, is an error."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
        use_attribute_docstrings=True,  # the descriptions of /openapi.json and docs/api.md
    )
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}
    route: ClassVar[str] = ""


B = TypeVar("B", bound=RequestBody)


def parse(kind: type[B], body: Body) -> B:
    """The request in `body`, or a RequestError that names the field and never its value."""
    fields = dict(body.fields)
    nested: dict[str, Any] = {}
    for name in CONTAINERS:
        if name in fields:
            given = fields.pop(name)
            inner = _container(name, given)
            if body.form is not None and isinstance(given, dict):  # sent as `extra_body[seed]`
                inner = {key: _from_text(kind, key, value) for key, value in inner.items()}
            nested |= inner
    if body.form is not None:
        fields = {name: _from_text(kind, name, value) for name, value in fields.items()}
    merged = {SPELLINGS.get(name, name): value for name, value in (nested | fields).items()}
    try:
        wanted = kind.model_validate(_screen(kind, merged, body))
    except ValidationError as error:
        raise _translate(error) from None
    prompt = merged.get("prompt")
    if isinstance(prompt, str):
        body.notes.logged["prompt"] = prompt if body.log_prompts else fingerprint(prompt)
    return wanted


def _container(name: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    try:
        inner = parse_json(value) if isinstance(value, str) else value
    except RequestError as error:  # it speaks of a whole body
        if error.code not in ("invalid_json", "body_not_object"):
            raise
        inner = None
    if not isinstance(inner, dict):
        raise RequestError(f"{name} must be an object.", code="invalid_type", param=name)
    return inner


def fingerprint(prompt: str) -> str:
    """Tells prompts apart in a log without giving them away."""
    return f"sha256:{hashlib.sha256(prompt.encode()).hexdigest()[:16]} {len(prompt)} characters"


def _screen(kind: type[RequestBody], fields: dict[str, Any], body: Body) -> dict[str, Any]:
    """Drop what changes nothing, refuse what is not known or not done here."""
    kept: dict[str, Any] = {}
    for name, value in fields.items():
        if value is None and (name in kind.model_fields or name in kind.neutral):
            continue
        if name in kind.model_fields:
            kept[name] = value
        elif name in kind.neutral:
            _check_neutral(name, value, kind.neutral[name])
        else:
            unknown(name, kind.model_fields, body.lenient, body.notes, _home(name))
    return kept


def unknown(name: str, known: Iterable[str], lenient: bool, notes: Notes, home: str = "") -> None:
    """Refuse a name that is not `known`; where the operator is lenient, warn of it. `home` is the
    route that knows it."""
    shown = "".join(c for c in name[:64] if c.isprintable())
    if not lenient:
        raise RequestError(
            f"There is no parameter {shown!r}.",
            hint=f"It is one of {home}." if home else _suggestion(shown, known),
            code="unknown_parameter",
            param=shown,
        )
    if len(notes.warnings) == _MAX_WARNINGS:  # they share one header
        return
    word = shown.encode("ascii", "replace").decode()
    notes.warnings.append(f"unknown parameter ignored: {word}")


async def check_query(request: Request) -> None:
    """The names in a query string are checked like those in a body; FastAPI ignores others."""
    if not request.scope["query_string"]:
        return
    known = [field.alias for field in request.scope["route"].dependant.query_params]
    lenient = request.app.state.context.settings.lenient
    for name in request.query_params:
        if name not in known:
            unknown(name, known, lenient, request.state.notes)


def _home(name: str) -> str:
    """A route that knows this parameter; "" if none does."""
    kinds = [RequestBody]
    for kind in kinds:  # it grows meanwhile
        kinds += kind.__subclasses__()
        if kind.route and name in kind.model_fields:
            return kind.route
    return ""


def _suggestion(name: str, known: Iterable[str]) -> str:
    hint = suggest(name, known)
    return hint if hint.startswith("Did") else "docs/api.md lists the parameters."


def _check_neutral(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    for neutral in allowed:
        if isinstance(value, bool) == isinstance(neutral, bool) and value == neutral:
            return
    shown = ", ".join(json.dumps(neutral) for neutral in allowed)
    raise RequestError(
        f"{name} is not supported by this server and model.",
        hint=f"Leave it out, or send {shown}." if allowed else "Leave it out.",
        code="unsupported_parameter",
        param=name,
    )


def _from_text(kind: type[RequestBody], name: str, value: Any) -> Any:
    """A form carries texts: read them as the field's own type; the strict check comes after."""
    name = SPELLINGS.get(name, name)
    if name in kind.model_fields:
        wanted = _atoms(kind.model_fields[name].annotation)
    else:
        wanted = {type(neutral) for neutral in kind.neutral.get(name, ())}
    if isinstance(value, list):
        return [_read(item, wanted) for item in value]
    return _read(value, wanted)


def _read(text: Any, wanted: set[type]) -> Any:
    if not isinstance(text, str):
        return text
    if bool in wanted and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if int in wanted and _WHOLE.fullmatch(text):
        return int(text)
    if float in wanted and _REAL.fullmatch(text):
        return float(text)
    if int in wanted and _REAL.fullmatch(text) and isinstance(number := whole(float(text)), int):
        return number
    if dict in wanted:
        return parse_json(text)
    return text


def _atoms(annotation: Any) -> set[type]:
    """The plain types inside an annotation: `int | list[int] | None` gives int and NoneType."""
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return {type(value) for value in typing.get_args(annotation)}
    if origin is Annotated:
        return _atoms(typing.get_args(annotation)[0])
    if origin in (typing.Union, UnionType, list):
        return set().union(*(_atoms(inner) for inner in typing.get_args(annotation)))
    return {annotation}


def _translate(error: ValidationError) -> RequestError:
    first = error.errors(include_url=False, include_context=True, include_input=False)[0]
    path = first["loc"]
    # Behind the name of a field comes an index, or the type that a value was tried as.
    nested = len(path) > 1 and isinstance(path[1], int)
    param = ".".join(map(str, path if nested else path[:1]))
    kind, context = first["type"], first.get("ctx", {})
    if kind == "missing":
        return RequestError(f"{param} is required.", code="missing_parameter", param=param)
    if kind == "finite_number":
        return RequestError(f"{param} is not a finite number.", code="not_finite", param=param)
    if kind == "literal_error":
        text = f"{param} must be {context['expected']}."
        return RequestError(text, code="invalid_value", param=param)
    if kind == "extra_forbidden":
        within, _, name = param.rpartition(".")
        text = f"There is no parameter {name[:64]!r} in {within}."
        hint = "docs/api.md lists the parameters."
        return RequestError(text, hint=hint, code="unknown_parameter", param=param)
    bounds = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    for word, text in bounds.items():
        if word in context:
            bound = context[word]
            shown = f"{bound:g}" if isinstance(bound, float) else str(bound)
            text = f"{param} must be {text} {shown}."
            return RequestError(text, code="out_of_range", param=param)
    if kind == "string_too_long":
        text = f"{param} must have at most {context['max_length']} characters."
        return RequestError(text, code="out_of_range", param=param)
    if kind == "too_long":
        text = f"{param} must have at most {context['max_length']} items."
        return RequestError(text, code="out_of_range", param=param)
    stem = kind.partition("_")[0]
    wanted = _KINDS.get(stem, "of another type")
    return RequestError(f"{param} must be {wanted}.", code="invalid_type", param=param)
