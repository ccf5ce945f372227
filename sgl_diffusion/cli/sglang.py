"""`sglang` and its commands; each is imported only when it runs."""

from __future__ import annotations

from sgl_diffusion.cli.program import Command, Program

PROGRAM = Program(
    "sglang",
    {
        "serve": Command("serve a model over HTTP", "serve:main", "serve:parser"),
        "generate": Command(
            "make one image or video without a server", "generate:main", "generate:parser"
        ),
        "regenerate": Command(
            "make a file again from the settings it carries", "regenerate:main", "regenerate:parser"
        ),
        "profile": Command(
            "show where the time of one image or video goes", "profile:main", "profile:parser"
        ),
        "models": Command(
            "list native models, their defaults, and what is downloaded",
            "models:main",
            "models:parser",
        ),
        "pull": Command("download a model before it is served", "pull:main", "pull:parser"),
        "config": Command(
            "show the options that a serve command would use",
            "serve:show_config",
            "serve:config_parser",
            words=("show",),
        ),
        "doctor": Command(
            "check this machine, and say how to mend what is wrong", "doctor:main", "doctor:parser"
        ),
        "bench": Command(
            "time the kernels on this machine, or compare the quality of pictures",
            "bench:main",
            "bench:parser",
            words=("kernels", "quality"),
            parsers={"quality": "quality:parser"},
        ),
        "completion": Command(
            "complete these commands in bash, zsh or fish",
            "completion:main",
            words=("bash", "zsh", "fish"),
        ),
    },
)
main = PROGRAM.main
