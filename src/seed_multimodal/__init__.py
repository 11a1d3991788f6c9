"""SEED Multimodal: an image becomes discrete tokens, a language model reads and writes them, tokens
become an image.

Importing this package is light (no torch). The objects below load on first use:

    from seed_multimodal import MultimodalSystem
    system = MultimodalSystem.from_pretrained("nano")
    print(system.describe("cat.png"))
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers and editors
    from seed_multimodal.compat.seed_llama import SeedLlamaTokenizer as SeedLlamaTokenizer
    from seed_multimodal.images.io import open_image as open_image
    from seed_multimodal.language.tokenizer import MultimodalTokenizer as MultimodalTokenizer
    from seed_multimodal.models.seed.diffusion import UnclipDetokenizer as UnclipDetokenizer
    from seed_multimodal.models.seed.modeling import Seed2Tokenizer as Seed2Tokenizer
    from seed_multimodal.pipelines.base import MultimodalSystem as MultimodalSystem

from seed_multimodal.transformers import registration

__version__ = "0.1.0"

if importlib.util.find_spec("torch") is None:
    raise ModuleNotFoundError(
        f"torch is not installed for {sys.executable}; install it by bash install.sh, "
        "then activate it by source .venv/bin/activate.",
        name="torch",
    )

# Model hubs are opt-in: an unreachable name otherwise costs about 25 s of silent retries.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# If bitsandbytes and torchao are installed, transformers and diffusers import them, with warnings
# about missing kernels; torch.compile warns about a missing CUDA. The safety checker's own warning
# says less than ours.
for _library in (
    "bitsandbytes",
    "torchao",
    "torch.utils._pytree",
    "torch.utils.cpp_extension",
    "diffusers.quantizers.torchao",
    "diffusers.pipelines.stable_diffusion.safety_checker",
):
    logging.getLogger(_library).setLevel(logging.ERROR)

registration.install()

_LAZY = {
    "MultimodalSystem": "seed_multimodal.pipelines.base",
    "SeedLlamaTokenizer": "seed_multimodal.compat.seed_llama",
    "Seed2Tokenizer": "seed_multimodal.models.seed.modeling",
    "UnclipDetokenizer": "seed_multimodal.models.seed.diffusion",
    "MultimodalTokenizer": "seed_multimodal.language.tokenizer",
    "open_image": "seed_multimodal.images.io",
}

__all__ = ["__version__", *sorted(_LAZY)]


def __getattr__(name: str) -> Any:
    """Import a public object on first use, so that `import seed_multimodal` stays fast."""
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'seed_multimodal' has no attribute {name!r}")
