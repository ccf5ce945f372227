"""Numbers of files in tensors: with the native library, and one after the other without it."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sgl_diffusion.base import native
from sgl_diffusion.base.errors import SetupError
from sgl_diffusion.loader import reading
from sgl_diffusion.loader.header import DTYPES, read_header
from sgl_diffusion.loader.reading import Piece, read_pieces

WINDOW = 4 << 20  # of the native reader
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SIZES = [(0,), (), (1,), (7, 5), (1023,), (300_003,)]

needs_library = pytest.mark.skipif(bool(native.absent()), reason=native.absent() or "built")


@pytest.fixture(params=[pytest.param("together", marks=needs_library), "alone"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "alone":
        monkeypatch.setattr(native, "_absent", "it is not built")
        monkeypatch.setattr(reading, "_CHUNK", 1 << 20)
    else:  # several calls, with several windows in each
        monkeypatch.setattr(reading, "_CALL", WINDOW)


def pieces(file: Path, wanted: torch.dtype | None) -> dict[str, Piece]:
    """All of a file, in another precision or as it is."""
    found = {}
    for key, entry in read_header(file).items():
        stored = DTYPES[entry.dtype]
        dtype = wanted if wanted is not None and stored.is_floating_point else stored
        target = torch.empty(entry.shape, dtype=dtype)
        found[key] = Piece(file, key, entry.begin, stored, target)
    return found


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("wanted", [None, torch.float32, torch.bfloat16, torch.float16])
def test_bits_are_those_of_load_file(wanted: torch.dtype | None, tmp_path: Path) -> None:
    files = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for index, file in enumerate(files):
        values = {
            f"{dtype}.{place}": (torch.randn(size, dtype=torch.float64) * 10.0 ** (2 * index)).to(
                dtype
            )
            for dtype in FLOATS
            for place, size in enumerate(SIZES)
        }
        # Bytes of all lengths, so that what follows begins anywhere.
        values |= {f"{n} bytes": torch.randint(0, 255, (n,)).to(torch.uint8) for n in (1, 2, 5)}
        values |= {"count": torch.tensor(2**40 + 7), "flags": torch.tensor([True, False])}
        save_file(values, file, metadata={"format": "pt"})
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    read = [pieces(file, wanted) for file in files]
    read_pieces([piece for found in read for piece in found.values()])
    for file, found in zip(files, read, strict=True):
        for key, value in load_file(file).items():
            assert torch.equal(found[key].target, value.to(found[key].target.dtype)), key


@pytest.mark.usefixtures("_way")
def test_rows_are_filled_and_nothing_beside_them(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    value = torch.randn(5, 33)
    save_file({"a": value}, file)
    whole = torch.full((9, 33), 7.0, dtype=torch.bfloat16)
    (entry,) = read_header(file).values()
    read_pieces([Piece(file, "a", entry.begin, torch.float32, whole[2:7])])
    assert torch.equal(whole[2:7], value.bfloat16())
    assert (whole[:2] == 7).all() and (whole[7:] == 7).all()


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_a_file_that_ends_too_early_is_named(wanted: torch.dtype, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"a": torch.randn(100), "b": torch.randn(WINDOW // 2)}, file)
    found = list(pieces(file, wanted).values())
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(SetupError, match=r"a\.safetensors is damaged at b: it ends too early"):
        read_pieces(found)


@pytest.mark.usefixtures("_way")
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    piece = Piece(tmp_path / "gone", "a", 0, torch.float32, torch.empty(3))
    with pytest.raises(SetupError, match=r"gone cannot be read at a: No such file"):
        read_pieces([piece])
    (tmp_path / "gone").mkdir()
    with pytest.raises(SetupError, match=r"gone cannot be read at a: Is a directory"):
        read_pieces([piece])


def test_the_slow_way_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "_absent", "it is not built for this test")
    file = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(3)}, file)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            read_pieces(list(pieces(file, None).values()))
    assert caplog.text.count("read by one thread: it is not built for this test") == 1


@needs_library
@pytest.mark.parametrize("again", [True, False])
def test_only_what_is_read_once_passes_by_the_cache(
    again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directly: list[Path] = []
    opened = reading._opened_directly

    def noted(file: Path) -> AbstractContextManager[int]:
        directly.append(file)
        return opened(file)

    monkeypatch.setattr(reading, "_opened_directly", noted)
    file = tmp_path / "a.safetensors"
    save_file({"a": torch.arange(9)}, file)
    found = pieces(file, None)
    read_pieces(list(found.values()), again=again)
    assert torch.equal(found["a"].target, torch.arange(9))
    assert directly == ([] if again else [file])


@needs_library
def test_impossible_calls_are_refused() -> None:
    op, target = torch.ops.sgld.read_weights, torch.empty(4, 4)
    assert list(op([target[:0]], [-1], [-1], [0], [0], [0], 1)) == []
    with pytest.raises(ValueError, match="1 targets"):
        op([target], [0], [-1], [0], [0, 1], [0], 1)
    with pytest.raises(ValueError, match="not contiguous"):
        op([target.t()[:2]], [0], [-1], [0], [0], [0], 1)
    with pytest.raises(ValueError, match="no file 1"):
        op([target], [0], [-1], [1], [0], [0], 1)
    with pytest.raises(ValueError, match="no number type 9"):
        op([target], [0], [-1], [0], [0], [9], 1)
    with pytest.raises(ValueError, match="must be float32, bfloat16 or float16"):
        op([target.long()], [0], [-1], [0], [0], [2], 1)


@pytest.fixture
def _no_forced_turns() -> Iterator[None]:
    """Another thread gets the interpreter only from one that lets go of it."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    yield
    sys.setswitchinterval(interval)


@needs_library
@pytest.mark.usefixtures("_no_forced_turns")
def test_other_threads_run_meanwhile(tmp_path: Path) -> None:
    file = tmp_path / "bytes"
    file.write_bytes(bytes(WINDOW))
    target, begun, went = torch.empty(WINDOW, dtype=torch.uint8), threading.Lock(), []
    begun.acquire()

    def other() -> None:
        begun.acquire()
        went.append(True)

    thread = threading.Thread(target=other)
    with file.open("rb") as opened:
        descriptor = opened.fileno()
        thread.start()
        begun.release()
        for _ in range(500):
            torch.ops.sgld.read_weights([target], [descriptor], [-1], [0], [0], [0], 1)
            if went:
                break
    assert went
    thread.join()
