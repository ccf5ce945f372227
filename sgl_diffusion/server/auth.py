"""Keys before routing: whoever has none learns nothing, not even which routes there are."""

from __future__ import annotations

from collections import Counter

from starlette.types import ASGIApp, Receive, Scope, Send

from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.server.errors import turn_away
from sgl_diffusion.server.keys import NOBODY, Caller, Keys

PUBLIC_PATHS = frozenset({"/health", "/livez", "/readyz"})
# What changes the model for everybody, or writes where the server runs.
ADMIN_PATHS = frozenset(
    {
        "/v1/set_lora",
        "/v1/merge_lora_weights",
        "/v1/unmerge_lora_weights",
        "/v1/update_weights",
        "/update_weights_from_disk",
        "/start_profile",
        "/stop_profile",
        "/shutdown",
    }
)


class KeyGuard:
    """Checks `Authorization: Bearer` and tells the routes who calls: `request.state.caller`."""

    def __init__(
        self, app: ASGIApp, *, keys: Keys, public: frozenset[str], rejected: Counter[str]
    ) -> None:
        self.app = app
        self.keys = keys
        self.public = public
        self.rejected = rejected

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                scope.setdefault("state", {})["caller"] = self._caller(scope)
            except RequestError as error:
                response = turn_away(error, self.rejected)
                if response.status_code == 401:
                    response.headers["www-authenticate"] = "Bearer"
                await response(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _caller(self, scope: Scope) -> Caller:
        path = scope["path"]
        if path in self.public and scope["method"] in ("GET", "HEAD"):
            return NOBODY
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        caller = self._identify(given)
        if path in ADMIN_PATHS and not caller.admin:
            raise RequestError(
                "This call needs an admin key.",
                hint="The operator sets one with --admin-key-file.",
                code="admin_key_required",
            )
        return caller

    def _identify(self, given: list[bytes]) -> Caller:
        if not given and self.keys.required:
            raise RequestError(
                "An API key is needed.",
                hint="Send it as `Authorization: Bearer KEY`.",
                code="missing_api_key",
            )
        scheme, _, key = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        known = self.keys.caller(key.strip(b" ")) if scheme.lower() == b"bearer" else None
        if known is not None:
            return known
        if self.keys.required:
            raise RequestError("The API key is not valid.", code="invalid_api_key")
        return Caller(NOBODY.key_id, self.keys.open_admin)
