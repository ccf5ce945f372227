"""The keys that callers show: read from files or the environment, kept and compared as digests."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sgl_diffusion.base.errors import ConfigError
from sgl_diffusion.base.log import get_logger

log = get_logger(__name__)

_LEAST_LENGTH = 16


@dataclass(frozen=True)
class Caller:
    """Who asks: `key_id` tells keys apart in limits and logs and says nothing about them."""

    key_id: str
    admin: bool


NOBODY = Caller("anonymous", False)


@dataclass(frozen=True)
class Keys:
    """Digests of the user and admin keys. Without any, everybody is let in; whether they are
    admins then is up to `open_admin`: true only where nobody else reaches the port."""

    users: tuple[bytes, ...] = ()
    admins: tuple[bytes, ...] = ()
    open_admin: bool = True

    @classmethod
    def of(cls, users: Iterable[str], admins: Iterable[str] = (), *, local: bool = True) -> Keys:
        user_digests = tuple(_digest(key.encode()) for key in users)
        admin_digests = tuple(_digest(key.encode()) for key in admins)
        return cls(user_digests, admin_digests, local and not user_digests and not admin_digests)

    @property
    def required(self) -> bool:
        return bool(self.users)

    def caller(self, key: bytes) -> Caller | None:
        """Whose key this is. Every key is compared, so the time tells nothing."""
        given = _digest(key)
        user = [hmac.compare_digest(given, known) for known in self.users]
        admin = [hmac.compare_digest(given, known) for known in self.admins]
        return Caller(given.hex()[:12], any(admin)) if any(user) | any(admin) else None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def read_keys(path: str | None, variable: str, option: str) -> list[str]:
    """The keys of a file (one per line, `#` begins a remark) and of an environment variable."""
    keys = [variable] if variable else []
    if path is not None:
        keys += _of_file(Path(path), option)
    for key in keys:
        if len(key) < _LEAST_LENGTH or not key.isascii() or not key.isprintable() or " " in key:
            raise ConfigError(
                f"A key must have at least {_LEAST_LENGTH} visible ASCII characters.",
                hint="For example the output of: openssl rand -hex 32",
                param=option,
            )
    return keys


def _of_file(path: Path, option: str) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
        shared = path.stat().st_mode & 0o077
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"Cannot read the key file {path}: {reason}.", param=option) from None
    if shared:
        log.warning("other users of this machine may read %s; use chmod 600", path)
    keys = [line.strip() for line in text.splitlines()]
    keys = [key for key in keys if key and not key.startswith("#")]
    if not keys:
        raise ConfigError(f"The key file {path} holds no key.", param=option)
    return keys
