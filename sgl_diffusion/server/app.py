"""`create_app`: the whole HTTP surface around a client. Nothing is global."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import Depends, FastAPI
from starlette.routing import Route

from sgl_diffusion import __version__
from sgl_diffusion.base.trace import Record
from sgl_diffusion.server import (
    errors,
    events,
    image_store,
    images,
    info,
    lora,
    metrics,
    openapi,
    playground,
    profile,
    remix,
    video_content,
    videos,
)
from sgl_diffusion.server.admission import Admission
from sgl_diffusion.server.auth import PUBLIC_PATHS
from sgl_diffusion.server.background import VideoRunner
from sgl_diffusion.server.context import ServerContext, Settings
from sgl_diffusion.server.fetch import Fetcher
from sgl_diffusion.server.files import Files
from sgl_diffusion.server.flights import Flights
from sgl_diffusion.server.gauges import Gauges
from sgl_diffusion.server.inputs import Inputs
from sgl_diffusion.server.keeper import Keeper
from sgl_diffusion.server.outcomes import Outcomes
from sgl_diffusion.server.outer import middleware_of
from sgl_diffusion.server.pools import media_pool, video_pool
from sgl_diffusion.server.probe import Probe
from sgl_diffusion.server.rows import own_rows
from sgl_diffusion.server.sharing import Sharing
from sgl_diffusion.server.storage import Bucket
from sgl_diffusion.server.uploads import Uploads
from sgl_diffusion.server.validate import check_query

if TYPE_CHECKING:
    from sgl_diffusion.client.client import Client
    from sgl_diffusion.orchestrator.jobstore import JobStore

ROUTERS = (  # routes are tried in this order: polls and pictures first
    remix.router,  # before the videos: its fixed names are no ids
    videos.router,
    images.router,
    image_store.router,
    video_content.router,
    events.router,
    info.router,
    metrics.router,
    openapi.router,
    lora.router,
    profile.router,
    playground.router,
)


def create_app(client: Client, jobs: JobStore, settings: Settings) -> FastAPI:
    """`client` and `jobs` are started and stopped by the caller; the app's own work lives in its
    lifespan. `app.state.context` is what the routes share."""
    threads, encoders = media_pool(), video_pool()
    files = Files(settings.data_dir)
    keeper = Keeper(jobs, files, settings.jobs)
    admission = Admission(settings.jobs, keeper)
    record = Record()
    outcomes = Outcomes(jobs, files, keeper, encoders, record, metadata=settings.metadata)
    runner = VideoRunner(client, jobs, files, settings, admission, outcomes)
    sharing = Sharing(runner, client)
    fetcher = Fetcher(settings.fetch)
    inputs = Inputs(settings.inputs, fetcher, threads)
    probe = Probe(client)
    gauges = Gauges()
    uploads = None
    if settings.s3 is not None:
        uploads = Uploads(Bucket(settings.s3), jobs, files.folder)
    context = ServerContext(
        client=client,
        files=files,
        inputs=inputs,
        runner=runner,
        settings=settings,
        threads=threads,
        probe=probe,
        jobs=jobs,
        admission=admission,
        keeper=keeper,
        flights=Flights(),
        gauges=gauges,
        record=record,
        uploads=uploads,
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        gauges.start()
        await keeper.start()
        await runner.start()
        sharing.start()
        if uploads is not None:
            await uploads.start()
        try:
            yield
        finally:
            await probe.stop()
            await sharing.stop()
            await runner.stop()
            await keeper.stop()
            await gauges.stop()
            if uploads is not None:
                await uploads.stop()
            fetcher.close()
            for pool in (threads, encoders):
                pool.shutdown(cancel_futures=True)

    app = FastAPI(
        title="sgl_diffusion",
        version=__version__,
        lifespan=lifespan,
        openapi_url=None,  # server/openapi.py knows the bodies, the framework does not
        redirect_slashes=False,
        dependencies=[Depends(check_query)],
        middleware=middleware_of(settings, context.rejected, PUBLIC_PATHS | playground.PATHS),
    )
    app.state.context = context
    errors.install(app, routes())
    for router in ROUTERS:
        app.include_router(router, dependencies=[Depends(own_rows)])
    return app


def routes() -> list[Route]:
    """Every route of the app, in the order in which they are tried."""
    return [route for router in ROUTERS for route in router.routes if isinstance(route, Route)]
