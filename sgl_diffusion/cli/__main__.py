"""`python -m sgl_diffusion.cli`: the same as `sglang`, for a tree that is not installed."""

from __future__ import annotations

import sys

from sgl_diffusion.cli.sglang import main

if __name__ == "__main__":
    sys.exit(main())
