"""An S3 bucket, of Amazon or of anybody who speaks its protocol. Calls block: use threads."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sgl_diffusion.base import env
from sgl_diffusion.base.config import ServeOptions
from sgl_diffusion.base.errors import ConfigError, SetupError, UnavailableError
from sgl_diffusion.base.log import get_logger
from sgl_diffusion.server.media import IMAGE_TYPES, VIDEO_VARIANTS

log = get_logger(__name__)

_CONNECT_SECONDS = 5
_READ_SECONDS = 30
_TYPES = dict(VIDEO_VARIANTS.values()) | {f".{name}": kind for name, kind in IMAGE_TYPES.items()}


@dataclass(frozen=True, kw_only=True)
class S3Settings:
    """Where results are copied to. Without keys, boto3 looks for them where AWS tools keep them."""

    bucket: str
    endpoint_url: str | None = None
    region: str | None = None
    prefix: str = ""
    url_seconds: int = 0
    access_key: str | None = field(default=None, repr=False)
    secret_key: str | None = field(default=None, repr=False)


def s3_settings(options: ServeOptions) -> S3Settings | None:
    """From options, then our variables, then those of SGLang; None where no bucket is named."""
    kind = env.get("SGLANG_CLOUD_STORAGE_TYPE")
    if kind not in ("", "s3"):
        raise ConfigError(
            f"SGLANG_CLOUD_STORAGE_TYPE={kind!r} is not known.", hint="Use s3, or leave it out."
        )

    def first(option: str | None, name: str, peer: str) -> str | None:
        return (
            option or env.get(f"SGLD_S3_{name}") or (kind and env.get(f"SGLANG_S3_{peer}")) or None
        )

    bucket = first(options.s3_bucket, "BUCKET", "BUCKET_NAME")
    if bucket is None:
        if kind == "s3":
            raise ConfigError(
                "SGLANG_CLOUD_STORAGE_TYPE is s3, but no bucket is named.",
                hint="Set SGLANG_S3_BUCKET_NAME, or use --s3-bucket.",
            )
        return None
    access = first(None, "ACCESS_KEY_ID", "ACCESS_KEY_ID")
    secret = first(None, "SECRET_ACCESS_KEY", "SECRET_ACCESS_KEY")
    if (access is None) != (secret is None):
        raise ConfigError(
            "Of the two S3 keys only one is set.",
            hint="Set SGLD_S3_ACCESS_KEY_ID and SGLD_S3_SECRET_ACCESS_KEY.",
        )
    return S3Settings(
        bucket=bucket,
        endpoint_url=first(options.s3_endpoint_url, "ENDPOINT_URL", "ENDPOINT_URL"),
        region=first(options.s3_region, "REGION", "REGION_NAME"),
        prefix=options.s3_prefix,
        url_seconds=options.s3_url_seconds,
        access_key=access,
        secret_key=secret,
    )


class Bucket:
    """One bucket; every object is a whole file, named by `prefix` and the name of the file."""

    def __init__(self, settings: S3Settings) -> None:
        try:
            import boto3
            from boto3.s3.transfer import TransferConfig
            from botocore.config import Config
        except ImportError:
            raise SetupError(
                "Storing in S3 needs boto3, which is not installed.",
                hint="pip install 'sgl-diffusion[s3]'",
            ) from None
        self.settings = settings
        # The attempts are counted by whoever calls; threads are ours, too.
        self._transfer = TransferConfig(use_threads=False)
        session = boto3.session.Session()
        try:
            self._client = session.client(
                "s3",
                endpoint_url=settings.endpoint_url,
                region_name=settings.region or session.region_name or "us-east-1",
                aws_access_key_id=settings.access_key,
                aws_secret_access_key=settings.secret_key,
                config=Config(
                    connect_timeout=_CONNECT_SECONDS,
                    read_timeout=_READ_SECONDS,
                    retries={"total_max_attempts": 1},
                    signature_version="s3v4",
                ),
            )
        except ValueError:
            raise SetupError(
                f"{settings.endpoint_url!r} is not the URL of an S3 service.",
                hint="For example --s3-endpoint-url https://s3.example.org.",
            ) from None

    def key(self, name: str) -> str:
        return f"{self.settings.prefix}{name}"

    def put(self, path: Path) -> str:
        """Store a file and return its key; FileNotFoundError if it is gone."""
        if not path.is_file():
            raise FileNotFoundError(path)
        key = self.key(path.name)
        extra = {"ContentType": _TYPES.get(path.suffix, "application/octet-stream")}
        self._call(
            self._client.upload_file,
            str(path),
            self.settings.bucket,
            key,
            ExtraArgs=extra,
            Config=self._transfer,
        )
        return key

    def drop(self, name: str) -> None:
        """Delete every object whose file name begins with `name`."""
        where = {"Bucket": self.settings.bucket}
        found = self._call(self._client.list_objects_v2, **where, Prefix=self.key(name))
        for entry in found.get("Contents", []):
            self._call(self._client.delete_object, **where, Key=entry["Key"])

    def url(self, key: str) -> str:
        """Where a client finds an object: its plain address, or one that is signed for a time."""
        settings = self.settings
        if settings.url_seconds:
            return self.signed_url(key, settings.url_seconds)
        if settings.endpoint_url:
            return f"{settings.endpoint_url.rstrip('/')}/{settings.bucket}/{quote(key)}"
        region = self._client.meta.region_name
        return f"https://{settings.bucket}.s3.{region}.amazonaws.com/{quote(key)}"

    def signed_url(self, key: str, seconds: int = 600) -> str:
        """An address that opens a private object; made here, the bucket is not asked."""
        where = {"Bucket": self.settings.bucket, "Key": key}
        made = self._client.generate_presigned_url("get_object", Params=where, ExpiresIn=seconds)
        return str(made)

    def _call(self, work: Any, *args: Any, **options: Any) -> Any:
        """A call of boto3, whose exceptions are many; ours names the kind, the log has the text."""
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            return work(*args, **options)
        except (Boto3Error, BotoCoreError, ClientError, OSError) as error:
            log.warning("S3 bucket %s: %s", self.settings.bucket, error)
            raise UnavailableError(
                "The S3 storage does not answer.", code="storage_failed"
            ) from None
