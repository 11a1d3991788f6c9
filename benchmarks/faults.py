"""The model server with faults: its parts raise out-of-memory errors at random.

    python benchmarks/faults.py --system pretrained/nano --port 0

The flags are the server's. `SEED_FAULTS` is the share of calls that fail (0.01).
"""

from __future__ import annotations

import functools
import os
import random
import runpy
import sys
from collections.abc import Callable
from typing import Any

import torch
from shared import ROOT

from seed_multimodal.inference.backends.torch import TorchBackend
from seed_multimodal.inference.batching import DynamicBatcher
from seed_multimodal.serving import app, backend, schema

ERRORS = (
    (torch.OutOfMemoryError, "CUDA out of memory (injected)"),
    (MemoryError, "injected"),
    (RuntimeError, "DefaultCPUAllocator: not enough memory (injected)"),
)
# Functions of each part and their relative rates of failure: `decode` runs for each token.
PARTS: tuple[tuple[Any, str, float], ...] = (
    (TorchBackend, "prepare", 1.0),
    (TorchBackend, "prefill", 0.5),
    (TorchBackend, "decode", 0.02),
    (TorchBackend, "copy", 0.5),
    (DynamicBatcher, "_compute", 1.0),  # encoding and drawing of images
    (backend, "open_image", 1.0),
    (backend, "image_to_base64", 1.0),
    (schema, "read_request", 0.5),
    (app, "completion", 0.5),
)


def failing(function: Callable[..., Any], share: float, rng: random.Random) -> Callable[..., Any]:
    """The function, of which this share of the calls raises an error instead."""

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        if rng.random() < share:
            # A new error each time: one that is raised again keeps the frames of every raise.
            kind, text = rng.choice(ERRORS)
            raise kind(text)
        return function(*arguments, **options)

    return call


if __name__ == "__main__":
    rng = random.Random(0)
    share = float(os.environ.get("SEED_FAULTS", "0.01"))
    for owner, name, weight in PARTS:
        setattr(owner, name, failing(getattr(owner, name), share * weight, rng))
    program = str(ROOT / "gradio_demo" / "seed_llama_flask.py")
    sys.argv[0] = program
    runpy.run_path(program, run_name="__main__")
