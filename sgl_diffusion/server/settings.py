"""From the options of the command to what HTTP needs to know."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from sgl_diffusion.base import env
from sgl_diffusion.base.config import AccessOptions, LimitOptions, ServeOptions
from sgl_diffusion.base.errors import ConfigError, SetupError
from sgl_diffusion.server.context import Settings
from sgl_diffusion.server.fetch import FetchRules
from sgl_diffusion.server.inputs import InputRules
from sgl_diffusion.server.keys import Keys, read_keys
from sgl_diffusion.server.middleware import is_loopback
from sgl_diffusion.server.storage import s3_settings

P = TypeVar("P")

_DATABASES = ("postgresql://", "postgres://")
WILDCARDS = ("0.0.0.0", "::", "")


def settings_of(options: ServeOptions) -> Settings:
    """The settings of a server; reads the key files."""
    assert options.data_dir is not None
    if options.database_url and not options.database_url.startswith(_DATABASES):
        raise ConfigError(
            "database_url is no URL of a PostgreSQL.",
            hint="For example postgresql://name@host/database.",
            param="database_url",
        )
    limits = part_of(LimitOptions, options)
    return Settings(
        data_dir=Path(options.data_dir),
        served_model_name=options.served_model_name,
        model_path=options.model_path,
        public_base_url=options.public_base_url,
        num_gpus=options.num_gpus,
        dp_size=options.dp_size,
        jobs=options,
        metadata=options.metadata,
        allowed_hosts=hosts_of(options, options.host, options.public_base_url),
        any_address=options.host in WILDCARDS,
        cors_origins=origins_of(options.cors_origins),
        public_metrics=options.public_metrics,
        lenient=options.lenient,
        log_prompts=options.log_prompts,
        s3=s3_settings(options),
        keys=keys_of(options, options.host),
        limits=limits,
        lora_roots=folders_of("allowed_lora_path", options.allowed_lora_path),
        fetch=fetch_of(options),
        inputs=inputs_of(options, limits),
    )


def part_of(kind: type[P], options: Any) -> P:
    """The fields of `options` that a part of them has."""
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: getattr(options, name) for name in names})


def fetch_of(options: AccessOptions) -> FetchRules:
    hosts = frozenset(map(str.lower, _list(options.allow_media_host)))
    return FetchRules(mode=options.media_urls, hosts=hosts)


def inputs_of(options: AccessOptions, limits: LimitOptions) -> InputRules:
    return InputRules(
        image_bytes=limits.max_image_mb * 2**20,
        image_pixels=limits.max_image_megapixels * 10**6,
        image_count=limits.max_images,
        local_roots=folders_of("allowed_media_path", _list(options.allowed_media_path)),
    )


def keys_of(options: AccessOptions, host: str) -> Keys:
    users = read_keys(options.api_key_file, env.get("SGLD_API_KEY"), "api_key_file")
    admins = read_keys(options.admin_key_file, env.get("SGLD_ADMIN_KEY"), "admin_key_file")
    return Keys.of(users, admins, local=is_loopback(host))


def hosts_of(options: AccessOptions, host: str, base_url: str | None) -> frozenset[str]:
    hosts = {host.lower(), *map(str.lower, _list(options.allowed_hosts))}
    if base_url:
        name = urlsplit(base_url).hostname
        if name is None:
            raise SetupError(
                f"public_base_url {base_url!r} is not a URL.",
                hint="For example https://images.example.org.",
            )
        hosts.add(name)
    return frozenset(hosts - {""})


def origins_of(text: str) -> frozenset[str]:
    for origin in _list(text):
        parts = urlsplit(origin)
        if parts.scheme not in ("http", "https") or origin != f"{parts.scheme}://{parts.netloc}":
            raise ConfigError(
                f"cors_origins: {origin!r} is not an origin.",
                hint="For example https://studio.example.org.",
                param="cors_origins",
            )
    return frozenset(_list(text))


def folders_of(option: str, entries: Iterable[str]) -> tuple[Path, ...]:
    folders = tuple(Path(entry) for entry in entries)
    for folder in folders:
        if not folder.is_absolute() or not folder.is_dir():
            raise ConfigError(
                f"{option}: {folder} is not an absolute path of a folder.",
                param=option,
            )
    return folders


def _list(text: str) -> list[str]:
    return [entry.strip() for entry in text.split(",") if entry.strip()]
