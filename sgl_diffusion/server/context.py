"""What the routes share: the client, the job table, the files, the settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, Request

from sgl_diffusion.base.config import JobOptions, LimitOptions
from sgl_diffusion.base.errors import NotFoundError, UnavailableError
from sgl_diffusion.base.params import ModelCard
from sgl_diffusion.orchestrator.messages import Metric
from sgl_diffusion.server.fetch import FetchRules
from sgl_diffusion.server.inputs import InputRules
from sgl_diffusion.server.keys import Keys
from sgl_diffusion.server.shared import AppContext

if TYPE_CHECKING:
    from sgl_diffusion.client.client import Client
    from sgl_diffusion.orchestrator.jobstore import JobStore
    from sgl_diffusion.server.admission import Admission
    from sgl_diffusion.server.background import VideoRunner
    from sgl_diffusion.server.files import Files
    from sgl_diffusion.server.flights import Flights
    from sgl_diffusion.server.keeper import Keeper
    from sgl_diffusion.server.probe import Probe
    from sgl_diffusion.server.storage import S3Settings
    from sgl_diffusion.server.uploads import Uploads


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the operator chose, as far as HTTP is concerned."""

    data_dir: Path
    served_model_name: str | None = None
    model_path: str | None = None
    public_base_url: str | None = None
    num_gpus: int = 1
    dp_size: int = 1
    jobs: JobOptions = JobOptions()
    metadata: bool = True
    allowed_hosts: frozenset[str] = frozenset()
    any_address: bool = False
    cors_origins: frozenset[str] = frozenset()
    public_metrics: bool = False
    lenient: bool = False
    log_prompts: bool = False
    keys: Keys = Keys()
    limits: LimitOptions = LimitOptions()
    fetch: FetchRules = FetchRules()
    inputs: InputRules = InputRules()
    lora_roots: tuple[Path, ...] = ()
    s3: S3Settings | None = None


@dataclass(kw_only=True)
class ServerContext(AppContext[ModelCard]):
    client: Client
    files: Files
    runner: VideoRunner
    probe: Probe
    jobs: JobStore
    admission: Admission
    keeper: Keeper
    flights: Flights
    uploads: Uploads | None = None
    readiness: str = ""  # as a poller was told last

    def samples(self) -> list[Metric]:
        uploads = [] if self.uploads is None else self.uploads.metrics()
        return [
            *super().samples(),
            *self.admission.metrics(),
            *self.keeper.metrics(),
            *self.jobs.metrics(),
            *uploads,
        ]

    def remote_url(self, entry: dict[str, Any]) -> str | None:
        """Where else a file of a row can be had; None where it is only here."""
        return None if self.uploads is None else self.uploads.url(entry)

    def redirect_url(self, entry: dict[str, Any]) -> str | None:
        """Where to send a client whose file is not here any more."""
        return None if self.uploads is None else self.uploads.redirect(entry)

    async def check_here(self, job_id: str) -> None:
        """UnavailableError for files that another server has, and has not copied yet."""
        if await self.jobs.elsewhere(job_id):
            raise UnavailableError(
                "The file is on another server, and not in the bucket yet.",
                hint="Ask again; without --s3-bucket ask the server that made it.",
            )

    def check_model(self, name: str | None, card: ModelCard) -> str | None:
        """A request may name the served model or its path, or leave the name out. After a colon
        comes the nickname of an adapter, which is returned."""
        names = dict.fromkeys([self.model_name(card), card.name, card.path])
        if self.settings.model_path:
            names[self.settings.model_path] = None
        if name is None or name in names:
            return None
        for base in names:
            if name.startswith(f"{base}:"):
                return name.removeprefix(f"{base}:")
        raise NotFoundError(
            "This server does not serve that model.",
            hint=f"It serves {self.model_name(card)!r}.",
            code="model_not_found",
            param="model",
        )


async def _of_request(request: Request) -> ServerContext:
    context = request.app.state.context
    assert isinstance(context, ServerContext)
    return context


Context = Annotated[ServerContext, Depends(_of_request)]
