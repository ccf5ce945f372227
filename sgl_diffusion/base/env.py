"""The environment variables of this package: one table, read nowhere else.

Each has a name, a type, a default and a sentence; a value that cannot be read is an error, never
ignored. `docs/environment.md` is generated from `TABLE`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sgl_diffusion.base.errors import ConfigError


def _flag(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("", "0", "false", "no", "off"):
        return False
    raise ValueError("use 1 or 0")


@dataclass(frozen=True)
class Variable:
    name: str
    parse: Callable[[str], Any]
    default: Any
    doc: str


TABLE = {
    variable.name: variable
    for variable in (
        Variable("SGLD_OPS", str, "", "Implementation of named ops: `norm_modulate=triton,...`."),
        Variable(
            "SGLD_CPU_ISA",
            str,
            "",
            "CPU kernels at most: amx_bf16, avx512_bf16, avx512, avx2, scalar.",
        ),
        Variable("SGLD_LIBRARY", str, "", "Path of another native library than the built one."),
        Variable(
            "SGLD_MAP_WEIGHTS",
            _flag,
            True,
            "Use the pages of weight files that are in the page cache; 0 copies them.",
        ),
        Variable(
            "SGLD_LOG_LEVEL", str, "", "Default of `--log-level`: debug, info, warning, error."
        ),
        Variable(
            "SGLD_LOG_FORMAT", str, "", "text or json; text on a terminal, json everywhere else."
        ),
        Variable("SGLD_DATA_DIR", str, "", "Default of `--data-dir`."),
        Variable("SGLD_API_KEY", str, "", "A key of `sglang serve`, beside `--api-key-file`."),
        Variable("SGLD_ADMIN_KEY", str, "", "An admin key, beside `--admin-key-file`."),
        Variable("SGLD_DATABASE_URL", str, "", "Default of `--database-url`, with its password."),
        Variable("SGLD_DEBUG", _flag, False, "Show tracebacks on the command line."),
        Variable("SGLD_S3_BUCKET", str, "", "Default of `--s3-bucket`."),
        Variable("SGLD_S3_ENDPOINT_URL", str, "", "Default of `--s3-endpoint-url`."),
        Variable("SGLD_S3_REGION", str, "", "Default of `--s3-region`."),
        Variable("SGLD_S3_ACCESS_KEY_ID", str, "", "Key of the S3 bucket."),
        Variable("SGLD_S3_SECRET_ACCESS_KEY", str, "", "Secret of the S3 bucket's key."),
        Variable(
            "SGLANG_CLOUD_STORAGE_TYPE", str, "", "`s3` makes the five variables below count."
        ),
        Variable("SGLANG_S3_BUCKET_NAME", str, "", "SGLang's name of `SGLD_S3_BUCKET`."),
        Variable("SGLANG_S3_ENDPOINT_URL", str, "", "SGLang's name of `SGLD_S3_ENDPOINT_URL`."),
        Variable("SGLANG_S3_REGION_NAME", str, "", "SGLang's name of `SGLD_S3_REGION`."),
        Variable("SGLANG_S3_ACCESS_KEY_ID", str, "", "SGLang's name of `SGLD_S3_ACCESS_KEY_ID`."),
        Variable(
            "SGLANG_S3_SECRET_ACCESS_KEY",
            str,
            "",
            "SGLang's name of `SGLD_S3_SECRET_ACCESS_KEY`.",
        ),
        Variable("OMP_WAIT_POLICY", str, "PASSIVE", "How idle CPU threads of a worker wait."),
        Variable("GLOO_SOCKET_IFNAME", str, "lo", "Where ranks on CPUs talk: loopback."),
        Variable("NCCL_SOCKET_IFNAME", str, "lo", "Where ranks on GPUs meet: loopback."),
        Variable("HF_ENDPOINT", str, "", "Another hub than huggingface.co."),
        Variable("HF_HUB_OFFLINE", _flag, False, "Never ask the hub; use its cache only."),
        Variable("HF_TOKEN", str, "", "Token for gated repositories."),
        Variable("XDG_DATA_HOME", str, "", "Where the default data folder goes."),
    )
}


_SECRET = frozenset({"SGLD_API_KEY", "SGLD_ADMIN_KEY", "SGLD_DATABASE_URL"})


def get(name: str) -> Any:
    """The value of one variable of the table, parsed."""
    variable = TABLE[name]
    text = os.environ.get(name)
    if text is None:
        return variable.default
    try:
        return variable.parse(text)
    except ValueError as error:
        raise ConfigError(f"{name}={text!r} cannot be read: {error}.", hint=variable.doc) from None


def talk_over(interface: str) -> None:
    """Let the ranks in this process use another interface than loopback, unless one is set."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if get(name) == TABLE[name].default:
            os.environ[name] = interface


def child_environment(extra: dict[str, str] | None = None) -> dict[str, str]:
    """The environment a worker process starts with.

    It needs no keys of clients. Its threads sleep where they wait: spinning ones stall as soon as
    another process wants a core (docs/measured.md). The variable must be there before the thread
    library is loaded. Ranks of one model talk over loopback only.
    """
    names = ("OMP_WAIT_POLICY", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    fixed = {name: str(get(name)) for name in names}
    kept = {name: text for name, text in os.environ.items() if name not in _SECRET}
    return {**kept, **fixed, **(extra or {})}
