"""Lines on the console, of the first process only or of any."""

from __future__ import annotations

import os


def log(text: str) -> None:
    """A line of the first process."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def log_rank(text: str) -> None:
    """A line of any process, with its number if it is not the first."""
    rank = os.environ.get("RANK", "0")
    print(text if rank == "0" else f"[rank {rank}] {text}", flush=True)
