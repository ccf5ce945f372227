"""The LoRA calls: set_lora, merge_lora_weights, unmerge_lora_weights, list_loras, forget one."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any, TypeVar

from fastapi import APIRouter, Request

from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.base.lora import LoraSetting, LoraUse, check_strength, check_target
from sgl_diffusion.loader.adapters.paths import check_lora_path
from sgl_diffusion.server.body import Body, read_body
from sgl_diffusion.server.context import Context, ServerContext
from sgl_diffusion.server.schemas.common import Sampling
from sgl_diffusion.server.schemas.lora import MergeLora, SetLora, UnmergeLora
from sgl_diffusion.server.validate import RequestBody, parse

router = APIRouter(prefix="/v1")

B = TypeVar("B", bound=RequestBody)
W = TypeVar("W", LoraSetting, LoraUse)


@router.post("/set_lora")
async def set_lora(request: Request, context: Context) -> dict[str, Any]:
    """Replace the set of adapters that all jobs have."""
    wanted = await _read(request, context, SetLora)
    settings = allow_paths(request, context, wanted.settings(), "lora_path")
    report = await context.client.loras.set(settings, wanted.merge_mode or "auto")
    names = ", ".join(setting.nickname for setting in settings)
    targets = ", ".join(dict.fromkeys(setting.target for setting in settings))
    strengths = ", ".join(f"{setting.strength:.2f}" for setting in settings)
    what = f"{names} (target: {targets}, strength: {strengths})"
    answer = _ok(f"Successfully set LoRA adapter(s): {what}", report)
    return answer | _left_out(report, {setting.nickname for setting in settings})


@router.post("/merge_lora_weights")
async def merge(request: Request, context: Context) -> dict[str, Any]:
    """Put the set back into use after an unmerge."""
    wanted = await _read(request, context, MergeLora)
    check_target(wanted.target)
    check_strength(wanted.strength)
    report = await context.client.loras.merge(wanted.target, wanted.strength)
    what = f"(target: {wanted.target}, strength: {wanted.strength:.2f})"
    return _ok(f"Successfully merged LoRA weights {what}", report)


@router.post("/unmerge_lora_weights")
async def unmerge(request: Request, context: Context) -> dict[str, Any]:
    """Take the set out of use; the weights are again those that were loaded."""
    wanted = await _read(request, context, UnmergeLora)
    check_target(wanted.target)
    report = await context.client.loras.unmerge(wanted.target)
    return _ok(f"Successfully unmerged LoRA weights (target: {wanted.target})", report)


@router.get("/list_loras")
async def list_loras(context: Context) -> dict[str, Any]:
    """What is loaded, what is in use, and whether a change waits."""
    return await context.client.loras.report()


@router.delete("/loras/{nickname}")
async def delete(request: Request, context: Context, nickname: str) -> dict[str, Any]:
    """Forget an adapter that nobody uses."""
    if not request.state.caller.admin:
        raise RequestError(
            "This call needs an admin key.",
            hint="The operator sets one with --admin-key-file.",
            code="admin_key_required",
        )
    await context.client.loras.delete(nickname)
    return {"nickname": nickname, "object": "lora.deleted", "deleted": True}


def allow_paths(
    request: Request, context: ServerContext, wanted: Sequence[W], param: str
) -> tuple[W, ...]:
    """The same with every path checked: may this caller name it, and is it of this machine?"""
    trusted = request.state.caller.admin
    allowed = context.settings.lora_roots
    return tuple(
        one
        if one.path is None
        else dataclasses.replace(
            one,
            local=check_lora_path(one.path, trusted=trusted, allowed=allowed, param=param),
        )
        for one in wanted
    )


def loras_of(
    request: Request, context: ServerContext, wanted: Sampling, adapter: str | None
) -> tuple[LoraUse, ...]:
    """The adapters of a request: that of its model name (`base:adapter`), and those it lists."""
    named = () if adapter is None else (LoraUse(nickname=adapter),)
    listed = tuple(entry.use() for entry in wanted.lora)
    return allow_paths(request, context, (*named, *listed), "lora")


async def _read(request: Request, context: ServerContext, kind: type[B]) -> B:
    """The body under any content type, as `curl -d` sends it; an empty one has the defaults.

    A web page can send such a body without asking, so whatever comes from one has to say JSON.
    """
    context.check_open()
    from_page = "origin" in request.headers or "sec-fetch-site" in request.headers
    length = request.headers.get("content-length", "0")
    if length == "0" and "transfer-encoding" not in request.headers:
        return parse(kind, Body({}))
    return parse(kind, await read_body(request, form=False, any_type=not from_page))


def _left_out(report: dict[str, Any], nicknames: Collection[str]) -> dict[str, Any]:
    """Parts of the files that this model has no place for: `component.layer` names, by nickname."""
    unmatched = {
        adapter["nickname"]: adapter["unmatched"]
        for adapter in report["loaded_adapters"]
        if adapter["nickname"] in nicknames and adapter.get("unmatched")
    }
    return {"unmatched": unmatched} if unmatched else {}


def _ok(message: str, report: dict[str, Any]) -> dict[str, Any]:
    return {"status": "ok", "message": message, "active": report["active"]}
