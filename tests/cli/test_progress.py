"""A bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
import os

import pytest

from sgl_diffusion.cli.progress import Progress
from sgl_diffusion.client.types import Snapshot


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(out):
    progress = Progress(out)
    progress.say("loading")
    for phase, step in [
        ("encode", 0),
        ("denoise", 1),
        ("denoise", 2),
        ("denoise", 2),
        ("decode", 2),
    ]:
        progress.show(Snapshot("x", "in_progress", 0, step, 2, phase, 1, None))
    progress.end()
    progress.say("done")
    return out.getvalue()


def test_plain_lines():
    text = run(io.StringIO())
    assert "\r" not in text and "\x1b" not in text
    assert [line.partition("  ")[0] for line in text.splitlines()] == [
        "loading", "0/2 encode", "1/2 denoise", "2/2 denoise", "2/2 decode", "done",
    ]  # fmt: skip


def test_bar():
    text = run(Terminal())
    assert text.count("\r") == 4  # the repeated step is not drawn again
    assert "[##############..............] 1/2 denoise" in text
    assert text.endswith("2/2 decode\ndone\n")


@pytest.mark.parametrize("columns", [8, 20, 40])
def test_a_narrow_terminal_gets_no_line_that_wraps(monkeypatch, columns):
    out = Terminal()
    out.fileno = lambda: 7
    size = os.terminal_size((columns, 24))
    monkeypatch.setattr("os.get_terminal_size", {7: size}.__getitem__)
    lines = [line.partition("\n")[0] for line in run(out).split("\r\x1b[K")[1:]]
    assert len(lines) == 4 and all(0 < len(line) < columns for line in lines)


def test_a_job_that_has_not_begun_shows_nothing():
    out = Terminal()
    Progress(out).show(Snapshot("x", "queued", 0, 0, 0, "", 1, 3))
    assert out.getvalue() == ""


@pytest.mark.parametrize("columns", [30, 120])
def test_bytes_of_a_download(monkeypatch, columns):
    out = Terminal()
    out.fileno = lambda: 7
    monkeypatch.setattr("os.get_terminal_size", {7: os.terminal_size((columns, 24))}.__getitem__)
    report = Progress(out).bytes_of("org/wan")
    for done in (0, 10**6, 4 * 10**6):
        report(done, 4 * 10**6)
    *_, last = out.getvalue().split("\r\x1b[K")
    assert "4.0 MB of 4.0 MB" in last and len(last) < columns
    assert ("[####" in last) == (columns == 120)


def test_bytes_where_there_is_no_terminal(monkeypatch):
    monkeypatch.setattr("sgl_diffusion.loader.progress.EVERY_SECONDS", 0.0)
    out = io.StringIO()
    Progress(out).bytes_of("org/wan")(10**6, 2 * 10**9)
    assert out.getvalue() == "downloading org/wan: 1.0 MB of 2.00 GB\n"
