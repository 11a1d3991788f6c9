"""The model server as a process whose parts run out of memory at random.

    python tests/support/faulty_server.py SHARE --system pretrained/nano --port 0

SHARE of the calls of each part fail; the other flags are the server's.
"""

import functools
import random
import runpy
import sys
from collections.abc import Callable

import torch
from repository import ROOT

from seed_multimodal.images.io import StoredImage
from seed_multimodal.inference.backends.torch import TorchBackend
from seed_multimodal.inference.batching import DynamicBatcher

ERRORS = (
    (torch.OutOfMemoryError, "CUDA out of memory (injected)"),
    (MemoryError, "injected"),
    (RuntimeError, "DefaultCPUAllocator: not enough memory (injected)"),
)
# Functions of each part and their relative rates of failure: `decode` runs for each token.
PARTS = (
    (TorchBackend, "prefill", 1.0),
    (TorchBackend, "decode", 0.05),
    (StoredImage, "decode", 1.0),
)


def failing(function: Callable, share: float) -> Callable:
    """The function, of which this share of the calls raises an error instead."""

    @functools.wraps(function)
    def call(*arguments, **options):
        if random.random() < share:
            # A new error each time: one that is raised again keeps the frames of every raise.
            kind, text = random.choice(ERRORS)
            raise kind(text)
        return function(*arguments, **options)

    return call


if __name__ == "__main__":
    random.seed(0)
    share = float(sys.argv.pop(1))
    for owner, name, weight in PARTS:
        setattr(owner, name, failing(getattr(owner, name), share * weight))
    # Encoding and drawing of images.
    with_work = DynamicBatcher.__init__
    DynamicBatcher.__init__ = lambda batcher, work, **options: with_work(
        batcher, failing(work, share), **options
    )
    program = str(ROOT / "gradio_demo" / "seed_llama_flask.py")
    sys.argv[0] = program
    runpy.run_path(program, run_name="__main__")
