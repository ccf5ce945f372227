"""What stands around the routes of every app: names, browsers, keys, slow bodies."""

from __future__ import annotations

from collections import Counter

from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from sgl_diffusion.server.auth import KeyGuard
from sgl_diffusion.server.context import Settings
from sgl_diffusion.server.limits import BodyClock
from sgl_diffusion.server.middleware import HeaderGuard, Outermost


def middleware_of(
    settings: Settings, rejected: Counter[str], public: frozenset[str]
) -> list[Middleware]:
    """From the outside to the inside: names and the net, browsers, keys, slow bodies. The paths in
    `public` want no key."""
    cors = Middleware(
        CORSMiddleware,
        allow_origins=sorted(settings.cors_origins),
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["authorization", "content-type", "idempotency-key", "x-request-id"],
        expose_headers=["x-request-id", "retry-after", "openai-poll-after-ms"],
    )
    metrics = {"/metrics"} if settings.public_metrics else set()
    return [
        Middleware(Outermost),
        Middleware(
            HeaderGuard,
            allowed_hosts=settings.allowed_hosts,
            origins=settings.cors_origins,
            any_address=settings.any_address,
            rejected=rejected,
        ),
        *([cors] if settings.cors_origins else []),
        Middleware(KeyGuard, keys=settings.keys, public=public | metrics, rejected=rejected),
        Middleware(BodyClock, pause=settings.limits.body_timeout),
    ]
