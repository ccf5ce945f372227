"""The completion scripts, in the shells that they are for."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from sgl_diffusion.cli import completion
from sgl_diffusion.cli.args import UsageError
from sgl_diffusion.cli.completion import programs
from sgl_diffusion.cli.shells import SHELLS

# A line up to the cursor, some of what completes its last word, and something that does not.
LINES = [
    ("sglang ser", {"serve"}, "generate"),
    ("sglang serve --max-q", {"--max-queue", "--max-queued-videos"}, "--port"),
    ("sgl-diffusion generate --no-m", {"--no-metadata"}, "--metadata"),
    ("sglang serve --device c", {"cpu", "cuda"}, "auto"),
    ("sglang config ", {"show"}, "--port"),
    ("sglang config show --orig", {"--origin"}, "--port"),
    ("sglang bench kernels --dev", {"--device"}, "--op"),
    ("sglang bench quality --min", {"--min-psnr", "--min-ssim"}, "--op"),
    ("sglang completion b", {"bash"}, "zsh"),
    ("sglang serve --config conf", {"config-file.yaml"}, "--config"),
    ("sglang regenerate conf", {"config-file.yaml"}, "--mask"),
    ("sglang generate --seed ", set(), "config-file.yaml"),
    ("sgl-omni serve --speec", {"--speech"}, "--port"),
]

BASH = """
source "$1"
COMP_WORDS=($2); [[ "$2" == *" " ]] && COMP_WORDS+=("")
COMP_CWORD=$(( ${#COMP_WORDS[@]} - 1 ))
compopt() { :; }  # it works only while a line is edited
function=$(complete -p "${COMP_WORDS[0]}" | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
$function; printf '%s\\n' "${COMPREPLY[@]}"
"""
FISH = 'source $argv[1]; complete -C "$argv[2]"'
# What the function hands to the line editor is caught: a terminal would only show it.
ZSH = """
typeset -ga caught
compdef() { for name in ${@:2}; do functions_of[$name]=$1; done }
_describe() { caught+=(${${(P)2}%%:*}) }
compadd() { shift; caught+=($@) }
_files() { caught+=(${~:-"${words[CURRENT]}*"}(N)) }
typeset -gA functions_of
source $1
words=(${(z)2}); [[ $2 == *' ' ]] && words+=('')
CURRENT=$#words
$functions_of[$words[1]]
print -rl -- ${(M)caught:#${words[CURRENT]}*}
"""
COMMANDS = {
    "bash": ["bash", "-c", BASH, "bash"],
    "zsh": ["zsh", "-f", "-c", ZSH, "zsh"],
    "fish": ["fish", "--no-config", "-c", FISH],
}


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scripts")
    for shell, write in SHELLS.items():
        (folder / shell).write_text(write(programs()))
    (folder / "config-file.yaml").touch()
    return folder


@pytest.mark.parametrize("shell", SHELLS)
def test_lines_are_completed(scripts: Path, shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    for line, wanted, other in LINES:
        done = subprocess.run(
            [*COMMANDS[shell], str(scripts / shell), line],
            cwd=scripts,
            capture_output=True,
            text=True,
            timeout=200,
        )
        found = {entry.partition("\t")[0] for entry in done.stdout.split("\n") if entry}
        assert wanted <= found and other not in found, (line, found, done.stderr)
        assert bool(found) == bool(wanted), (line, found)


def test_the_scripts_know_every_command_and_option() -> None:
    from sgl_diffusion.cli import omni, sglang

    for shell, write in SHELLS.items():
        text = write(programs())
        for command in (*sglang.PROGRAM.commands.values(), *omni.PROGRAM.commands.values()):
            parsers = [command.make_parser(word) for word in command.words or ("",)]
            for flag in {flag for p in parsers if p for flag in p._option_string_actions}:
                name = flag.removeprefix("--") if shell == "fish" else flag
                assert name in text, (shell, flag)


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert completion.main([]) == 2 and completion.main(["--help"]) == 0
    assert "source <(sglang completion bash)" in capsys.readouterr().out
    assert completion.main(["bash"]) == 0
    assert capsys.readouterr().out.endswith("complete -F _sgl_omni sgl-omni\n")
    for wrong in (["tcsh"], ["bash", "now"]):
        with pytest.raises(UsageError, match=f"knows no '{' '.join(wrong)}'"):
            completion.main(wrong)
