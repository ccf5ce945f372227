"""From what a user calls a model to a local folder: a path, or a hub id that is downloaded first.

Downloads go through huggingface_hub into its cache: a broken connection is taken up again at the
byte where it broke, and a file that is complete is never fetched twice. Only safetensors, configs
and tokenizer files are fetched; weights in pickle formats never are, because opening them runs
code.
"""

from __future__ import annotations

import difflib
import errno
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypeVar

from sgl_diffusion.base import env
from sgl_diffusion.base.errors import ModelNotFoundError, SetupError
from sgl_diffusion.base.log import get_logger
from sgl_diffusion.loader.files import PICKLE_SUFFIXES, check_variant, variant_of
from sgl_diffusion.loader.index import INDEX_NAME
from sgl_diffusion.loader.progress import Note, note_bar

SAFE_FILES = ("*.safetensors", "*.json", "*.txt", "*.model")

_ATTEMPTS = 3
# What is wrong here and not at the hub, so that another attempt would not help.
_OUR_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)
_log = get_logger(__name__)
T = TypeVar("T")


def local_model(path_or_id: str) -> Path | None:
    """The folder of that name; None for what may be a hub id. A path that leads nowhere is an error
    that is cheap to find before anything is started."""
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise ModelNotFoundError(
            f"{path_or_id} is a file; a model is a folder with a {INDEX_NAME}.",
            hint=f"Did you mean {str(path.parent)!r}?",
        )
    if not _may_be_id(path_or_id):
        raise ModelNotFoundError(
            f"There is no folder {path_or_id}.",
            hint=_close(path.name, _folders(path.parent)) or "Check the path.",
        )
    return None


def resolve_model(
    path_or_id: str,
    revision: str | None = None,
    *,
    variant: str | None = None,
    allow: Sequence[str] | None = None,
    cache_dir: Path | None = None,
    note: Note = _log.info,
) -> Path:
    """The local folder of a model. `variant` is fetched instead of the plain weights where both
    exist, `allow` replaces the patterns of the files worth having, and `note` hears how far a
    download is."""
    path = local_model(path_or_id)
    if path is not None:
        names = [file.name for file in path.rglob("*")]
        _refuse_only_pickle(path_or_id, names)
        check_variant(names, variant, path_or_id)
        return path
    repo = _Repo(path_or_id, revision, cache_dir, note)

    def choose(names: Sequence[str]) -> list[str]:
        _refuse_only_pickle(path_or_id, names)
        check_variant(names, variant, path_or_id)
        return choose_files(names, allow, variant)

    folder = repo.folder(choose)
    # A folder from the cache may hold less than the repository.
    check_variant([file.name for file in folder.rglob("*")], variant, path_or_id)
    return folder


def fetch_files(
    repository: str,
    choose: Callable[[Sequence[str]], list[str]],
    revision: str | None = None,
    *,
    cache_dir: Path | None = None,
    note: Note = _log.info,
) -> Path:
    """The local folder with the files that `choose` takes from the names in a repository."""
    repo = _Repo(repository, revision, cache_dir, note)
    folder = repo.folder(choose)
    # A folder from the cache may hold less than the repository.
    choose([str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()])
    return folder


@dataclass(frozen=True)
class _Repo:
    """One repository of the hub that HF_ENDPOINT names."""

    id: str
    revision: str | None
    cache_dir: Path | None
    note: Note

    def folder(self, choose: Callable[[Sequence[str]], list[str]]) -> Path:
        """The folder with the chosen files, from the hub or from an earlier download."""
        if env.get("HF_HUB_OFFLINE"):
            return self.cached("HF_HUB_OFFLINE is set")
        return self.download(choose)

    def download(self, choose: Callable[[Sequence[str]], list[str]]) -> Path:
        from huggingface_hub import HfApi, snapshot_download

        endpoint, token = env.get("HF_ENDPOINT") or None, env.get("HF_TOKEN") or None
        try:
            info = self._ask(
                lambda: HfApi(endpoint=endpoint, token=token).model_info(
                    self.id, revision=self.revision
                )
            )
            names = [sibling.rfilename for sibling in info.siblings or []]
            files = choose(names)
            if not files:
                raise SetupError(f"The repository {self.id} holds no file this program can use.")
        except _UnreachableError:
            _log.warning("the hub cannot be reached; looking for %s in its cache", self.id)
            return self.cached("the hub cannot be reached")
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
                        tqdm_class=note_bar(self.id, self.note),
                    )
                )
                return Path(folder)
            except _UnreachableError:
                _log.warning("download of %s: attempt %d broke off", self.id, attempt)
        raise ModelNotFoundError(
            f"The download of {self.id} broke off {_ATTEMPTS} times.",
            hint="Start again: it goes on with the files that are missing.",
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

    def _ask(self, call: Callable[[], T]) -> T:
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
                hint=self._suggestion() or "Check the spelling; a private one needs HF_TOKEN.",
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

    def _suggestion(self) -> str:
        from huggingface_hub.constants import HF_HUB_CACHE

        downloaded = [
            folder.removeprefix("models--").replace("--", "/")
            for folder in _folders(self.cache_dir or Path(HF_HUB_CACHE))
            if folder.startswith("models--")
        ]
        return _close(self.id, [*downloaded, *_folders(Path())])


class _UnreachableError(Exception):
    """The hub did not answer, or the connection broke."""


def choose_files(
    names: Sequence[str], allow: Sequence[str] | None = None, variant: str | None = None
) -> list[str]:
    """The files of a repository that are worth having.

    A repository in diffusers format may hold the same weights again: as one file at the top, and in
    another precision beside the plain files of a component. Of those the variant is taken, then the
    plain ones.
    """
    patterns = SAFE_FILES if allow is None else allow
    chosen = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
    chosen = [name for name in chosen if not name.endswith(PICKLE_SUFFIXES)]
    if allow is not None:
        return chosen
    if INDEX_NAME in names:
        chosen = [name for name in chosen if "/" in name or name == INDEX_NAME]
    sets: dict[Path, set[str | None]] = {}
    for name in filter(_is_weight, chosen):
        sets.setdefault(Path(name).parent, set()).add(variant_of(name))

    def wanted(name: str) -> bool:
        if ".safetensors" not in Path(name).name:
            return True
        there = sets.get(Path(name).parent, set())
        first = next((one for one in (variant, None) if one in there), variant_of(name))
        return variant_of(name) == first

    return [name for name in chosen if wanted(name)]


def _may_be_id(text: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def _is_weight(name: str) -> bool:
    return name.endswith(".safetensors")


def _refuse_only_pickle(model: str, names: Iterable[str]) -> None:
    names = list(names)
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    if pickles and not any(_is_weight(name) for name in names):
        raise SetupError(
            f"{model} holds its weights only in pickle format ({pickles[0]}), which can run code.",
            hint="Use a repository with safetensors weights, or convert them.",
            code="pickle_refused",
        )


def _folders(parent: Path) -> list[str]:
    return [p.name for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []


def _close(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"Did you mean {close[0]!r}?" if close else ""
