"""POST /v1/images/generations and POST /v1/images/edits."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from sgl_diffusion.base.errors import NotFoundError, RequestError
from sgl_diffusion.base.params import ResolvedParams, SamplingParams
from sgl_diffusion.client.types import partial_of
from sgl_diffusion.server.body import read_body
from sgl_diffusion.server.context import Context, ServerContext
from sgl_diffusion.server.edit_inputs import EditInputs
from sgl_diffusion.server.ids import new_id
from sgl_diffusion.server.image_job import KIND, ImageJob
from sgl_diffusion.server.lora import loras_of
from sgl_diffusion.server.repeats import origin_of
from sgl_diffusion.server.schemas import EditRequest, ImageRequest
from sgl_diffusion.server.sse import (
    PING,
    PING_SECONDS,
    EventStream,
    comment,
    frame,
    with_pings,
)
from sgl_diffusion.server.validate import parse

if TYPE_CHECKING:
    from sgl_diffusion.client.types import Event, GenerationHandle
    from sgl_diffusion.server.admission import Ticket

router = APIRouter(prefix="/v1/images")

_CLIENT_GONE = 499
_LOOK_SECONDS = 0.5  # a place in the queue moves without an event


@router.post("/generations")
async def generate(request: Request, context: Context) -> Response:
    context.check_open()
    body = await read_body(request, form=False)
    origin = await origin_of(request, body)
    wanted = parse(ImageRequest, body)
    adapter = context.check_model(wanted.model, context.card())
    wish = replace(wanted.wish(), loras=loras_of(request, context, wanted, adapter))
    params = resolve(context, wish, video=False, by_size=wanted.size is not None)
    model = context.model_name(context.card())
    job = ImageJob(context, new_id(KIND), wanted, params, model, "image_generation", origin)
    return await _run(request, job)


@router.post("/edits")
async def edit(request: Request, context: Context) -> Response:
    context.check_open()
    image_id = new_id(KIND)
    inputs = EditInputs(context, image_id)
    try:
        body = await read_body(request, form=True)
        try:
            if body.form is None:
                raise RequestError(
                    "Edits are sent as a form.",
                    hint="Send multipart/form-data.",
                    code="unsupported_media_type",
                )
            origin = await origin_of(request, body)
            wanted = parse(EditRequest, body)
            card = context.card()
            adapter = context.check_model(wanted.model, card)
            loras = loras_of(request, context, wanted, adapter)
            await inputs.read(card, wanted)
        finally:
            await body.close()
        wish = wanted.edit_wish(card, inputs.size, inputs.images, inputs.mask)
        wish = replace(wish, loras=loras)
        params = resolve(context, wish, video=False, by_size=wanted.size is not None)
        model = context.model_name(card)
        job = ImageJob(context, image_id, wanted, params, model, "image_edit", origin)
        return await _run(request, job, inputs)
    finally:
        if not inputs.taken:
            inputs.remove()


@router.post("/variations")
async def variations() -> None:
    raise NotFoundError(
        "There are no variations.",
        hint="Use /v1/images/edits with a strength.",
        code="not_supported",
    )


def resolve(
    context: ServerContext, wish: SamplingParams, *, video: bool, by_size: bool
) -> ResolvedParams:
    """The client's answer to a wish; a wrong edge is blamed on `size` where that was sent."""
    try:
        return context.client.resolve(wish, video=video)
    except RequestError as error:
        if by_size and error.code == "invalid_size":
            error.param = "size"
        if error.param == "images" and not video:
            error.param = "image"
        raise


async def _run(request: Request, job: ImageJob, inputs: EditInputs | None = None) -> Response:
    """Answer with events, or with one body: made now, or for the same request before."""
    answer = await job.earlier()
    if job.wanted.stream:
        return await _stream(job, inputs) if answer is None else EventStream(_again(job, answer))
    if answer is None:
        make = partial(_answer, job, inputs)
        answer = await job.context.flights.answer(request, job.origin, make)
    return Response(status_code=_CLIENT_GONE) if answer is None else await job.respond(answer)


async def _answer(job: ImageJob, inputs: EditInputs | None) -> dict[str, Any]:
    """The whole work of a request that waits; cancelling it cancels the job."""
    with _enter(job) as ticket:
        handle = await _submit(job, inputs, ticket)
        try:
            return await job.body(await handle.result())
        finally:
            _close(handle, inputs)


async def _stream(job: ImageJob, inputs: EditInputs | None) -> Response:
    """The input files and the place in the queue go when the stream is over."""
    ticket = _enter(job)
    try:
        handle = await _submit(job, inputs, ticket)
    except BaseException:
        ticket.drop()
        raise

    def close() -> None:
        _close(handle, inputs)
        ticket.close("cancelled")  # nothing, where the events have told another end

    return EventStream(_events(job, handle, handle.events(), ticket), close)


def _enter(job: ImageJob) -> Ticket:
    return job.context.admission.enter(KIND, job.origin.owner, job.kind)


async def _submit(job: ImageJob, inputs: EditInputs | None, ticket: Ticket) -> GenerationHandle:
    context = job.context
    try:
        if inputs is not None:
            inputs.taken = True
        ticket.handle = await context.client.submit(
            job.params,
            job_id=job.id,
            deadline=context.settings.jobs.request_timeout,
            asked=ticket.asked,
        )
    except BaseException:
        if inputs is not None:
            inputs.remove()
        raise
    return ticket.handle


def _close(handle: GenerationHandle, inputs: EditInputs | None) -> None:
    handle.cancel()  # does nothing to a job that has ended
    if inputs is not None:
        inputs.remove()


async def _again(job: ImageJob, answer: dict[str, Any]) -> AsyncIterator[bytes]:
    """The pictures that the same request got before."""
    same = {"id": answer["id"], "created_at": answer["created"]}
    for index, entry in enumerate(answer["data"]):
        yield frame(job.completed(index, entry) | same)


async def _events(
    job: ImageJob, handle: GenerationHandle, events: AsyncIterator[Event], ticket: Ticket
) -> AsyncIterator[bytes]:
    """Partial pictures as they come, then every finished one; comments in between say where the job
    stands. `events` are those since it was submitted: some may come before the first is asked for.
    """
    shown: set[tuple[int, int]] = set()
    last: dict[str, Any] = {}
    sent = time.monotonic()
    with ticket:
        async for event in with_pings(events, _LOOK_SECONDS):
            part = None if event is None else partial_of(event)
            if part is not None and (part.row, part.index) not in shown:
                shown.add((part.row, part.index))  # a worker that died shows them once more
                yield frame(await job.partial(part.index, part.row, part.picture))
            elif (stands := _stands(job, handle)) != last:
                yield comment(stands)
                last, sent = stands, time.monotonic()
            elif time.monotonic() - sent >= PING_SECONDS:
                yield PING
                sent = time.monotonic()
        for index, entry in enumerate(await job.finish(await handle.result())):
            yield frame(job.completed(index, entry))


def _stands(job: ImageJob, handle: GenerationHandle) -> dict[str, Any]:
    """Its place among those that wait, or its step, with the seconds that are left."""
    now, eta = handle.snapshot(), job.context.admission.eta
    if now.queue_position is not None:
        ahead = now.queue_position
        return {"queue_position": ahead, "eta_s": eta(KIND, ahead + 1)}
    left = eta(KIND, 1 - now.progress / 100)
    return {"step": now.step, "steps": now.total, "phase": now.phase, "eta_s": left}
