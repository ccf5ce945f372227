"""From what a user calls a model to a local folder: a path, or a hub id that is downloaded first.

Downloads go through huggingface_hub into its cache: a broken connection is taken up again at the
byte where it broke, and a file that is complete is never fetched twice. Only safetensors, configs
and tokenizer files are fetched; weights in pickle formats never are, because opening them runs
code.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from sgl_diffusion.base.errors import ModelNotFoundError, SetupError
from sgl_diffusion.base.log import get_logger
from sgl_diffusion.loader.files import PICKLE_SUFFIXES, check_variant, variant_of
from sgl_diffusion.loader.index import INDEX_NAME
from sgl_diffusion.loader.progress import Note, Report
from sgl_diffusion.loader.repository import Repository, closest, folders_in

SAFE_FILES = ("*.safetensors", "*.json", "*.txt", "*.model")

_log = get_logger(__name__)


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
            hint=closest(path.name, folders_in(path.parent)) or "Check the path.",
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
    report: Report | None = None,
    known: Sequence[str] = (),
) -> Path:
    """The local folder of a model. `variant` is fetched instead of the plain weights where both
    exist, `allow` replaces the patterns of the files worth having, and `note` hears how far a
    download is, unless `report` wants every number. A wrong name is told the nearest of `known`."""
    path = local_model(path_or_id)
    if path is not None:
        names = [file.name for file in path.rglob("*")]
        _refuse_only_pickle(path_or_id, names)
        check_variant(names, variant, path_or_id)
        return path
    repo = Repository(path_or_id, revision, cache_dir, note, report, known)

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
    repo = Repository(repository, revision, cache_dir, note)
    folder = repo.folder(choose)
    # A folder from the cache may hold less than the repository.
    choose([str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()])
    return folder


def check_sums(repository: str, folder: Path, revision: str | None = None) -> int:
    """How many files in `folder` have the bytes that the hub's checksums promise; those that have
    not are removed from the cache, and SetupError names them."""
    right, wrong = 0, []
    for name, file in Repository(repository, revision, None, _log.info).files().items():
        path = folder / name
        if file.sha256 is None or not path.is_file():
            continue
        with path.open("rb") as opened:
            if hashlib.file_digest(opened, "sha256").hexdigest() == file.sha256:
                right += 1
                continue
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        wrong.append(name)
    if wrong:
        raise SetupError(
            f"Of {repository}, {', '.join(wrong)} arrived damaged.",
            hint="Start again: what was damaged is removed, the rest is kept.",
        )
    return right


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
