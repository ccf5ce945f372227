"""From the options of `sgl-omni serve` to what HTTP needs to know."""

from __future__ import annotations

from pathlib import Path

from sgl_diffusion.base.config import JobOptions, LimitOptions
from sgl_diffusion.base.omni import OmniServeOptions
from sgl_diffusion.server.context import Settings
from sgl_diffusion.server.settings import (
    WILDCARDS,
    fetch_of,
    hosts_of,
    inputs_of,
    keys_of,
    origins_of,
    part_of,
)


def omni_settings(options: OmniServeOptions, folder: Path) -> Settings:
    """The settings of a server that keeps the media of requests in `folder`."""
    limits = part_of(LimitOptions, options)
    return Settings(
        data_dir=folder,
        served_model_name=options.model_name,
        model_path=options.model_path,
        jobs=JobOptions(request_timeout=options.request_timeout),
        allowed_hosts=hosts_of(options, options.host, None),
        any_address=options.host in WILDCARDS,
        cors_origins=origins_of(options.cors_origins),
        public_metrics=options.public_metrics,
        lenient=options.lenient,
        log_prompts=options.log_prompts,
        keys=keys_of(options, options.host),
        limits=limits,
        fetch=fetch_of(options),
        inputs=inputs_of(options, limits),
    )
