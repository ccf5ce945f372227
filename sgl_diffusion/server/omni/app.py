"""`create_omni_app`: the HTTP surface around a chat client. Nothing is global."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Depends, FastAPI
from starlette.routing import Route

from sgl_diffusion import __version__
from sgl_diffusion.base.omni import OmniServeOptions
from sgl_diffusion.client.chat import ChatClient
from sgl_diffusion.server import errors
from sgl_diffusion.server.auth import PUBLIC_PATHS
from sgl_diffusion.server.context import Settings
from sgl_diffusion.server.fetch import Fetcher
from sgl_diffusion.server.gauges import Gauges
from sgl_diffusion.server.inputs import Inputs
from sgl_diffusion.server.omni import chat, info, openapi, page, speech, transcriptions
from sgl_diffusion.server.omni.context import OmniContext
from sgl_diffusion.server.outer import middleware_of
from sgl_diffusion.server.pools import media_pool
from sgl_diffusion.server.validate import check_query

ROUTERS = (
    info.router,
    chat.router,
    speech.router,
    transcriptions.router,
    openapi.router,
    page.router,
)


def create_omni_app(client: ChatClient, settings: Settings, options: OmniServeOptions) -> FastAPI:
    """`client` is started and stopped by the caller. `app.state.context` is what the routes
    share."""
    threads = media_pool()
    fetcher = Fetcher(settings.fetch)
    gauges = Gauges()
    inputs = Inputs(settings.inputs, fetcher, threads)
    context = OmniContext(
        client=client,
        inputs=inputs,
        settings=settings,
        options=options,
        threads=threads,
        gauges=gauges,
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        gauges.start()
        try:
            yield
        finally:
            await gauges.stop()
            fetcher.close()
            threads.shutdown(cancel_futures=True)

    app = FastAPI(
        title="sgl_diffusion omni",
        version=__version__,
        lifespan=lifespan,
        openapi_url=None,
        redirect_slashes=False,
        dependencies=[Depends(check_query)],
        middleware=middleware_of(settings, context.rejected, PUBLIC_PATHS | page.PATHS),
    )
    app.state.context = context
    errors.install(app, routes())
    for router in ROUTERS:
        app.include_router(router)
    return app


def routes() -> list[Route]:
    """Every route of the app, in the order in which they are tried."""
    return [route for router in ROUTERS for route in router.routes if isinstance(route, Route)]
