"""Every page: links lead somewhere, commands and options exist, and so do variables and samples."""

from __future__ import annotations

import dataclasses
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from sgl_diffusion.base.env import TABLE
from sgl_diffusion.cli import omni, sglang
from sgl_diffusion.cli.args import Parser
from sgl_diffusion.cli.generate import with_prompt
from sgl_diffusion.server.schemas import EditRequest, VideoRequest
from sgl_diffusion.server.schemas.answers import Error, Image
from sgl_diffusion.server.schemas.lora import Lora

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.md")]
)
PROGRAMS = {"sglang": sglang.PROGRAM, "sgl-diffusion": sglang.PROGRAM, "sgl-omni": omni.PROGRAM}
LINK = re.compile(r"(?<!\!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
OURS = re.compile(rf"([\w./]*/)?({'|'.join(PROGRAMS)})\s")
# Options of other programs, in the text and in blocks.
FOREIGN = {
    "--build-arg", "--gpus", "--privileged", "--user", "--from-literal", "--no-build-isolation",
    "--no-deps", "--force-reinstall", "--upgrade", "--now", "--build", "--omni",
}  # fmt: skip


def ids(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(path: Path) -> str:
    """The page without its blocks."""
    return FENCE.sub("", path.read_text())


def anchors(path: Path) -> set[str]:
    """The fragments that a page's headings can be reached by."""
    found = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in found]
    return {heading.strip().replace(" ", "-") for heading in plain}


@cache
def parsers() -> dict[tuple[str, ...], Parser | None]:
    """By the words of the command."""
    found: dict[tuple[str, ...], Parser | None] = {}
    for name, program in PROGRAMS.items():
        for word, command in program.commands.items():
            for rest in command.words or ("",):
                parser = command.make_parser(rest)
                found[tuple(filter(None, (name, word, rest)))] = parser
    return found


@cache
def every_option() -> frozenset[str]:
    options = [parser._option_string_actions for parser in parsers().values() if parser]
    benches = [path.read_text() for path in (ROOT / "benchmarks").glob("*.py")]
    benches += [path.read_text() for path in (ROOT / "examples").rglob("*.py")]
    benches += [path.read_text() for path in (ROOT / "tests" / "faults").glob("*.py")]
    scripts = re.findall(r'add_argument\(\s*"(--[\w-]+)"', "\n".join(benches))
    return frozenset({flag for known in options for flag in known} | set(scripts) | FOREIGN)


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_somewhere(page: Path) -> None:
    for match in LINK.finditer(prose(page)):
        target = match[1] or match[2]
        if target.startswith(("http://", "https://")):
            continue
        name, _, fragment = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{target} leads nowhere"
        assert file.is_relative_to(ROOT), f"{target} leaves the repository"
        if fragment:
            assert fragment in anchors(file), f"{target}: no such heading"


def commands(text: str) -> list[list[str]]:
    """Our commands in a shell script, as lists of words; pipes and remarks are left out."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        if not OURS.match(line):
            continue
        words = shlex.split(line.partition(" #")[0].partition("|")[0].partition(">")[0], posix=True)
        found.append([Path(words[0]).name, *words[1:]])
    return found


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_commands_in_blocks_can_be_read(page: Path) -> None:
    for match in FENCE.finditer(page.read_text()):
        if match[1] not in ("bash", "sh", "console"):
            continue
        for command in commands(match[2]):
            if command[1:] in (["--help"], ["--version"]) or command[-1] == "--help":
                command = [word for word in command if word != "--help"]
                assert tuple(command) in parsers() or len(command) <= 2, command
                continue
            keys = [key for key in parsers() if tuple(command[: len(key)]) == key]
            assert keys, f"there is no command {' '.join(command)}"
            key = max(keys, key=len)
            parser = parsers()[key]
            words = command[len(key) :]
            if parser is not None:
                parser.parse_strict(with_prompt(words) if key[1] == "generate" else words)


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_options_and_variables_in_the_text_exist(page: Path) -> None:
    text = page.read_text() if page.name != "migration.md" else ours(page)
    named = set(re.findall(r"(?<![\w-])(--[a-z][a-z0-9-]+)", prose_code(text)))
    assert named <= every_option(), named - every_option()
    variables = set(re.findall(r"\bSGLD_[A-Z0-9_]+\b", text)) - {"SGLD_SKIP_EXT", "SGLD_CUDA"}
    assert {name for name in variables if not name.endswith("_")} <= set(TABLE)


def prose_code(text: str) -> str:
    """What is set in code between the lines."""
    return "\n".join(re.findall(r"`([^`\n]+)`", FENCE.sub("", text)))


def rows(page: Path) -> list[list[str]]:
    """The cells of every table's lines."""
    lines = [line for line in page.read_text().splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def ours(page: Path) -> str:
    """What the tables say of us: all columns but the first."""
    return "\n".join(" ".join(cells[1:]) for cells in rows(page))


def test_the_migration_table_names_what_is_here() -> None:
    page = ROOT / "docs" / "migration.md"
    told = [cells for cells in rows(page) if cells[0].startswith("`--")]
    assert len(told) >= 30
    serve = parsers()["sglang", "serve"]
    chat = parsers()["sgl-omni", "serve"]
    make = parsers()["sglang", "generate"]
    assert serve and chat and make
    known = {*serve._option_string_actions, *chat._option_string_actions}
    for theirs, here, *_ in told:
        options = known | set(make._option_string_actions)
        named = re.findall(r"--[a-z0-9-]+", here)
        assert set(named) <= options, (theirs, here)
        if not here:  # what we say is not there
            assert not set(re.findall(r"--[a-z0-9-]+", theirs)) & known, theirs


def test_fields_in_the_migration_tables_are_fields() -> None:
    kinds = (EditRequest, VideoRequest, Lora, Error, Image)
    fields = {name for kind in kinds for name in kind.model_fields}
    checked = 0
    for theirs, *here in rows(ROOT / "docs" / "migration.md"):
        if theirs.startswith("`--"):
            continue
        for code in re.findall(r"`([^`]+)`", " ".join(here)):
            words = [code] if re.fullmatch(r"[a-z_0-9]+", code) else re.findall(r'"(\w+)"', code)
            assert set(words) <= fields, (theirs, words)
            checked += len(words)
    assert checked >= 8


def test_samples_in_the_pages_are_measured_somewhere() -> None:
    source = "\n".join(path.read_text() for path in (ROOT / "sgl_diffusion").rglob("*.py"))
    for page in PAGES:
        for name in re.findall(r"`sgld_([a-z_]+[a-z])", prose(page)):
            base = re.sub(r"_(count|sum)$", "", name)
            assert f'"{base}' in source, f"{ids(page)}: sgld_{name}"


def test_the_guard_sees_what_is_wrong(tmp_path: Path) -> None:
    assert commands("sglang serve --port 1 | cat\n.venv/bin/sglang models # all\nls") == [
        ["sglang", "serve", "--port", "1"],
        ["sglang", "models"],
    ]
    assert "--prt" not in every_option() and "--port" in every_option()
    page = tmp_path / "a.md"
    page.write_text("# One two\n\n## `three`, four\n")
    assert anchors(page) == {"one-two", "three-four"}


def test_every_option_of_a_dataclass_has_a_help() -> None:
    from sgl_diffusion.base.config import ServeOptions
    from sgl_diffusion.base.omni import OmniServeOptions

    for kind in (ServeOptions, OmniServeOptions):
        for field in dataclasses.fields(kind):
            assert field.metadata["help"].endswith("."), field.name
