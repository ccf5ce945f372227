"""The page at `/` of a server that chats."""

from __future__ import annotations

from sgl_diffusion.server.static_page import StaticPage

PAGE = StaticPage("/chat", "chat.html", ("style.css", "chat.css", "chat.js", "sound.js", "api.js"))
PATHS = PAGE.paths
router = PAGE.router()
