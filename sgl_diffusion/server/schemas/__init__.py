"""What clients may send: the OpenAI fields and the diffusion fields, one model per route.

docs/api.md lists every field; a test compares it with these tables.
"""

from sgl_diffusion.server.schemas.edits import EditRequest
from sgl_diffusion.server.schemas.images import ImageRequest
from sgl_diffusion.server.schemas.videos import RemixRequest, VideoRequest

__all__ = ["EditRequest", "ImageRequest", "RemixRequest", "VideoRequest"]
