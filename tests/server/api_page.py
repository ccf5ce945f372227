"""The tables of docs/api.md, made from /openapi.json: `python -m tests.server.api_page` writes
them into the page, between lines that name them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from sgl_diffusion.server import openapi, schemas
from sgl_diffusion.server.schemas.common import REASONS, Sampling
from sgl_diffusion.server.schemas.lora import MergeLora, SetLora, UnmergeLora

PAGE = Path(__file__).parents[2] / "docs/api.md"
PART = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.S)
KINDS = {
    "images": schemas.ImageRequest,
    "edits": schemas.EditRequest,
    "videos": schemas.VideoRequest,
}
CALLS = (SetLora, MergeLora, UnmergeLora)


def page(text: str) -> str:
    """`text` with every table made anew."""
    made = tables(openapi.document(secured=False))
    return PART.sub(lambda part: part[1] + made[part[2]] + part[3], text)


def tables(document: dict[str, Any]) -> dict[str, str]:
    parts = document["components"]["schemas"]
    own = {name: parts[_schema(kind, parts)]["properties"] for name, kind in KINDS.items()}
    shared = list(Sampling.model_fields)
    required = {
        name for kind in KINDS.values() for name in parts[_schema(kind, parts)].get("required", ())
    }
    images = [name for name in _fields("images") if name not in shared]
    rows = {
        "both": (own["images"], shared),
        "images": (own["images"], images),
        "edits": (own["edits"], [n for n in _fields("edits") if n not in {*shared, *images}]),
        "videos": (own["videos"], [n for n in _fields("videos") if n not in shared]),
    }
    made = {
        name: _table(
            ["field", "default", "meaning"],
            [
                [f"`{field}`", _default(found[field], field in required), _said(found[field])]
                for field in fields
            ],
        )
        for name, (found, fields) in rows.items()
    }
    return made | {
        "routes": _table(["route", "body", ""], _routes(document["paths"])),
        "neutral": _table(["field", "route", "accepted"], _neutral()),
        "adapters": _table(["call", "field", "default", "meaning"], _calls(parts)),
    }


def _fields(name: str) -> list[str]:
    return list(KINDS[name].model_fields)


def _schema(kind: type, parts: dict[str, Any]) -> str:
    """An edit is always a form."""
    return kind.__name__ if kind.__name__ in parts else f"{kind.__name__}Form"


def _routes(paths: dict[str, Any]) -> list[list[str]]:
    rows, refused = [], []
    for path, methods in paths.items():
        for method, found in methods.items():
            if "200" not in found["responses"]:
                refused.append(f"`{method.upper()} {path}`")
                continue
            query = "&".join(
                f"{each['name']}={each['schema'].get('default', '')}"
                for each in found["parameters"]
                if each["in"] == "query"
            )
            kinds = found.get("requestBody", {}).get("content", {})
            body = " or ".join("form" if "form" in kind else "JSON" for kind in kinds)
            shown = f"`{method.upper()} {path}{'?' + query if query else ''}`"
            rows.append([shown, body, found["summary"]])
    return [*rows, [" ".join(refused), "", "Refused."]]


def _neutral() -> list[list[str]]:
    """A row for all names that the same routes accept at the same values."""
    where: dict[tuple[str, str], list[str]] = {}
    for route, kind in KINDS.items():
        for name, values in kind.neutral.items():
            accepted = " ".join(f"`{json.dumps(value)}`" for value in values)
            where.setdefault((name, f"{accepted} {_reason(name)}".strip()), []).append(route)
    rows: dict[tuple[str, str], list[str]] = {}
    for (name, accepted), routes in sorted(where.items()):
        rows.setdefault((" ".join(routes), accepted), []).append(f"`{name}`")
    return [[" ".join(names), routes, accepted] for (routes, accepted), names in rows.items()]


def _reason(name: str) -> str:
    said = REASONS.get(name)
    return f"({said[0].lower()}{said[1:]})" if said else ""


def _calls(parts: dict[str, Any]) -> list[list[str]]:
    rows = []
    for kind in CALLS:
        schema = parts[kind.__name__]
        for name in kind.model_fields:
            found = schema["properties"][name]
            default = _default(found, name in schema.get("required", ()))
            rows.append(
                [f"`{str(kind.__doc__).rpartition('/')[2]}`", f"`{name}`", default, _said(found)]
            )
    return rows


def _default(schema: dict[str, Any], required: bool) -> str:
    if required:
        return "required"
    default = schema.get("default")
    return "" if default in (None, []) else f"`{json.dumps(default)}`"


def _said(schema: dict[str, Any]) -> str:
    return " ".join(schema["description"].split()).removesuffix(".")


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(re.sub(r" +", " ", f"| {' | '.join(line)} |\n") for line in lines)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
