"""The page at `/` of a server that makes pictures: a playground."""

from __future__ import annotations

from sgl_diffusion.server.static_page import StaticPage

PAGE = StaticPage(
    "/playground",
    "index.html",
    ("style.css", "main.js", "api.js", "gallery.js", "paint.js", "request.js"),
)
PATHS = PAGE.paths
router = PAGE.router()
