"""One repository of the hub: asked, downloaded, or found in the cache of earlier downloads."""

from __future__ import annotations

import difflib
import errno
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from sgl_diffusion.base import env
from sgl_diffusion.base.errors import ModelNotFoundError, SetupError
from sgl_diffusion.base.log import get_logger
from sgl_diffusion.loader.index import INDEX_NAME
from sgl_diffusion.loader.progress import Note, Report, byte_bar, note_bytes, size_text

_ATTEMPTS = 3
_LETTERS = 3  # fewer are in every name
# What is wrong here and not at the hub, so that another attempt would not help.
_OUR_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)
_log = get_logger(__name__)
T = TypeVar("T")
Choose = Callable[[Sequence[str]], list[str]]


@dataclass(frozen=True)
class RepoFile:
    """A file of a repository as the hub tells of it: its bytes, its name in the cache, and the
    checksum that large files have."""

    size: int
    blob: str
    sha256: str | None


@dataclass(frozen=True)
class Repository:
    """One repository of the hub that HF_ENDPOINT names; `known` are published ones that may be
    meant by a wrong name."""

    id: str
    revision: str | None
    cache_dir: Path | None
    note: Note
    report: Report | None = None
    known: Sequence[str] = ()

    def folder(self, choose: Choose) -> Path:
        """The folder with the chosen files, from the hub or from an earlier download."""
        if env.get("HF_HUB_OFFLINE"):
            return self.cached("HF_HUB_OFFLINE is set")
        return self.download(choose)

    def download(self, choose: Choose) -> Path:
        from huggingface_hub import snapshot_download

        endpoint, token = env.get("HF_ENDPOINT") or None, env.get("HF_TOKEN") or None
        try:
            there = self.files(choose)
            files = choose(list(there))
            if not files:
                raise SetupError(f"The repository {self.id} holds no file this program can use.")
            self._check_room([there[name] for name in files])
        except _UnreachableError:
            _log.warning("the hub cannot be reached; looking for %s in its cache", self.id)
            return self.cached("the hub cannot be reached")
        report = self.report or note_bytes(self.id, self.note)
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                folder = self._ask(
                    lambda: snapshot_download(
                        self.id,
                        revision=self.revision,
                        cache_dir=self.cache_dir,
                        endpoint=endpoint,
                        token=token,
                        allow_patterns=files,
                        tqdm_class=byte_bar(report),
                    )
                )
                return Path(folder)
            except _UnreachableError:
                _log.warning("download of %s: attempt %d broke off", self.id, attempt)
        raise ModelNotFoundError(
            f"The download of {self.id} broke off {_ATTEMPTS} times.",
            hint="Start again: it goes on with the files that are missing.",
        )

    def files(self, choose: Choose | None = None) -> dict[str, RepoFile]:
        """What the repository holds, by name; `choose` says what of another one would be wanted."""
        from huggingface_hub import HfApi

        api = HfApi(endpoint=env.get("HF_ENDPOINT") or None, token=env.get("HF_TOKEN") or None)
        info = self._ask(
            lambda: api.model_info(self.id, revision=self.revision, files_metadata=True), choose
        )
        found = {}
        for one in info.siblings or []:
            checksum = one.lfs.sha256 if one.lfs else None
            blob = checksum or one.blob_id or "unknown"
            found[one.rfilename] = RepoFile(one.size or 0, blob, checksum)
        return found

    def _check_room(self, wanted: Iterable[RepoFile]) -> None:
        """Refuse what the disk cannot take, and say where an earlier download goes on."""
        cache = self._cache()
        blobs = cache / f"models--{self.id.replace('/', '--')}" / "blobs"
        there = missing = 0
        for file in wanted:
            if (blobs / file.blob).is_file():
                there += file.size
            else:
                missing += file.size
        if there and missing:
            self.note(f"resuming {self.id} at {size_text(there)} of {size_text(there + missing)}")
        free = free_at(cache)
        if missing > free:
            raise SetupError(
                f"{self.id} needs {size_text(missing)} more in {cache}, "
                f"where {size_text(free)} are free.",
                hint="Make room, or name another folder for the hub's cache with HF_HOME.",
            )

    def cached(self, why: str) -> Path:
        """The folder of an earlier download."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            folder = snapshot_download(
                self.id,
                revision=self.revision,
                cache_dir=self.cache_dir,
                local_files_only=True,
                allow_patterns=[INDEX_NAME],
            )
        except LocalEntryNotFoundError as error:
            raise ModelNotFoundError(
                f"{self.id} is neither a folder nor in the hub's cache, and {why}.",
                hint=self._suggestion() or "Check the connection, or use a local folder.",
            ) from error
        return Path(folder)

    def _ask(self, call: Callable[[], T], choose: Choose | None = None) -> T:
        """A call to the hub, with what can go wrong in words of our own."""
        from huggingface_hub.errors import (
            GatedRepoError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        try:
            return call()
        except GatedRepoError as error:
            hub = env.get("HF_ENDPOINT") or "https://huggingface.co"
            raise ModelNotFoundError(
                f"The repository {self.id} is gated: its licence has to be accepted first.",
                hint=f"Accept it at {hub}/{self.id}, then set HF_TOKEN to a token of that account.",
            ) from error
        except RepositoryNotFoundError as error:
            raise ModelNotFoundError(
                f"There is no folder and no public repository {self.id}.",
                hint=self._suggestion(choose)
                or "Check the spelling; a private one needs HF_TOKEN.",
            ) from error
        except RevisionNotFoundError as error:
            raise ModelNotFoundError(
                f"The repository {self.id} has no revision {self.revision}.",
                hint="Use one of its branches or tags, or a commit.",
                param="revision",
            ) from error
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _OUR_DISK:
                raise SetupError(
                    f"{self.id} cannot be stored: {os.strerror(error.errno)}.",
                    hint="Make room, or name another folder for the hub's cache with HF_HOME.",
                ) from error
            _log.debug("the hub failed", exc_info=True)
            raise _UnreachableError from error

    def _suggestion(self, choose: Choose | None = None) -> str:
        """What is here under nearly this name, else what is known, and the way to it."""
        downloaded = [
            folder.removeprefix("models--").replace("--", "/")
            for folder in folders_in(self._cache())
            if folder.startswith("models--")
        ]
        if here := closest(self.id, [*downloaded, *folders_in(Path())]):
            return here
        name = nearest(self.id, self.known)
        return name and f"Did you mean {name!r}{self._cost(name, choose)}? Run: sglang pull {name}"

    def _cost(self, name: str, choose: Choose | None) -> str:
        """What another repository takes, as far as the hub tells."""
        if choose is None:
            return ""
        try:
            files = replace(self, id=name, revision=None, known=()).files()
            size = sum(files[each].size for each in choose(list(files)))
        except (SetupError, _UnreachableError):
            return ""
        return f" ({size_text(size)} to download, {size_text(free_at(self._cache()))} free)"

    def _cache(self) -> Path:
        from huggingface_hub.constants import HF_HUB_CACHE

        return self.cache_dir or Path(HF_HUB_CACHE)


class _UnreachableError(Exception):
    """The hub did not answer, or the connection broke."""


def folders_in(parent: Path) -> list[str]:
    return [p.name for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []


def free_at(folder: Path) -> int:
    """Bytes that are free where `folder` is, or would be."""
    return shutil.disk_usage(next(f for f in (folder, *folder.parents) if f.exists())).free


def closest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"Did you mean {close[0]!r}?" if close else ""


def nearest(name: str, known: Iterable[str]) -> str:
    """The shortest of `known` that has every word of `name` in it, "" for none."""
    words = [word for word in re.split(r"[^a-z0-9.]+", name.lower()) if word]
    if sum(map(len, words)) < _LETTERS:
        return ""
    return min((k for k in known if all(w in k.lower() for w in words)), key=len, default="")
