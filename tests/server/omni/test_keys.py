"""Who may call an omni server."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import httpx

from sgl_diffusion.apps.omni import omni_app
from sgl_diffusion.base.omni import OmniServeOptions
from sgl_diffusion.client.chat import ChatClient
from sgl_diffusion.server.keys import Keys
from sgl_diffusion.server.omni.app import create_omni_app, routes
from sgl_diffusion.server.omni.settings import omni_settings


def test_every_route_wants_the_key(tmp_path: Path) -> None:
    """No model is needed to be turned away, or to be told that it is loading."""
    key = "user-0123456789abcdef"
    options = OmniServeOptions(model_path="/models/omni", device="cpu")
    client = ChatClient(omni_app(options), in_process=True)
    settings = replace(omni_settings(options, tmp_path), keys=Keys.of([key], [], local=True))
    app = create_omni_app(client, settings, options)

    async def story() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
            for route in routes():
                path = route.path.replace("{model_id:path}", "x")
                for method in route.methods or ():
                    answer = await http.request(method, path)
                    public = path in ("/health", "/readyz", "/livez")
                    assert (answer.status_code != 401) == public, (method, path)
            mine = {"authorization": f"Bearer {key}"}
            body = {"messages": [{"role": "user", "content": "a"}]}
            answer = await http.post("/v1/chat/completions", json=body, headers=mine)
            assert answer.status_code == 503 and answer.json()["error"]["code"] == "not_ready"
            foreign = {**mine, "origin": "https://evil.test"}
            answer = await http.post("/v1/chat/completions", json=body, headers=foreign)
            assert answer.status_code == 403

    asyncio.run(story())
