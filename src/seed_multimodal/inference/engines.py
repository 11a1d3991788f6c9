"""Choice of the engine: our own with torch or llama.cpp, or a completion server."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from seed_multimodal.entry import MAX_RUNNING
from seed_multimodal.errors import ConfigError
from seed_multimodal.inference.backends.base import GIB
from seed_multimodal.inference.backends.torch import TorchBackend, joined
from seed_multimodal.inference.base_engine import BaseEngine, GeneratedSequence
from seed_multimodal.inference.engine import Engine
from seed_multimodal.inference.prompt import ImageFeatures, Prompt
from seed_multimodal.language.text_tokenizer import TextTokenizer
from seed_multimodal.nn.layers import avoid_slow_bfloat16
from seed_multimodal.settings import check_settings, positive, setting

if TYPE_CHECKING:
    from seed_multimodal.language.llm import LanguageModel

TORCH = "torch"
LLAMA_CPP = "llama.cpp"
COMPLETION_SERVER = "openai"
NO_ENGINE = "none"  # of a system that only encodes and draws images, and builds prompts
WITHOUT_WEIGHTS = (COMPLETION_SERVER, NO_ENGINE)  # engines that read no language model
COMPILED_OFFLOAD = (
    "--compile does not work with an off-loaded language model, whose weights "
    "change their address with every move: leave one of the two out."
)


class NoEngine(BaseEngine):
    """Of a system that was loaded without its language model."""

    n_waiting = 0

    def __init__(self, tokenizer: TextTokenizer) -> None:
        super().__init__(tokenizer, sys.maxsize, sys.maxsize, sys.maxsize)  # nothing is too long

    def _put(self, sequence: GeneratedSequence) -> None:
        raise ConfigError("This system was loaded without its language model.")


@dataclass(frozen=True)
class EngineOptions:
    """Which engine, and its limits. Raises ConfigError: options out of range, or that exclude each
    other; ImportError: llama.cpp is missing.

    url: of the completion server.
    gguf: llama.cpp's file; None: the only one in the folder.
    max_running: sequences at once: rows of the KV cache.
    kv_cache: GiB for keys and values; None: see `default_budget`.
    compiled: tokens are computed by `torch.compile`.
    offload_device: where a torch model computes that rests on the CPU.
    context: tokens of a row at most; None: the model's.
    """

    name: str = setting(TORCH, choices=(TORCH, LLAMA_CPP, COMPLETION_SERVER, NO_ENGINE))
    url: str | None = None
    gguf: str | Path | None = None
    max_running: int = positive(MAX_RUNNING)
    kv_cache: float | None = setting(None, above=0)
    compiled: bool = False
    offload_device: torch.device | None = None
    context: int | None = positive(None)

    def __post_init__(self) -> None:
        check_settings(self, "engine")
        if self.url is not None and self.name != COMPLETION_SERVER:
            raise ConfigError(f"--url is for --engine {COMPLETION_SERVER}, not for {self.name}.")
        if self.gguf is not None and self.name != LLAMA_CPP:
            raise ConfigError(f"--gguf is for --engine {LLAMA_CPP}, not for {self.name}.")
        if self.compiled and self.name != TORCH:
            raise ConfigError(f"--compile is for --engine {TORCH}, not for {self.name}.")
        if self.compiled and self.offload_device is not None:
            raise ConfigError(COMPILED_OFFLOAD)
        if self.name == LLAMA_CPP:
            importlib.import_module("llama_cpp")  # reported before models are loaded

    @property
    def cache_bytes(self) -> int | None:
        return None if self.kv_cache is None else int(self.kv_cache * GIB)


def torch_engine(
    llm: LanguageModel,
    tokenizer: TextTokenizer,
    options: EngineOptions = EngineOptions(),  # noqa: B008 (frozen)
    embed_features: Callable[[Sequence[ImageFeatures]], Tensor] = joined,
) -> Engine:
    """The engine of a transformers model; `embed_features`: see `TorchBackend`."""
    avoid_slow_bfloat16(llm)
    backend = TorchBackend(
        llm,
        max_rows=options.max_running,
        cache_bytes=options.cache_bytes,
        context=options.context,
        compiled=options.compiled,
        device=options.offload_device,
        embed_features=embed_features,
    )
    return Engine(backend, tokenizer)


def outside_engine(
    options: EngineOptions,
    tokenizer: TextTokenizer,
    llm_folder: str | Path | None,
    embed_prompt: Callable[[Prompt], Tensor],
) -> BaseEngine:
    """llama.cpp, with the sizes of `llm_folder`, a completion server, or none."""
    if options.name == NO_ENGINE:
        return NoEngine(tokenizer)
    if options.name == COMPLETION_SERVER:
        from seed_multimodal.inference.backends.completion_server import CompletionServerEngine

        return CompletionServerEngine(
            tokenizer, options.url, embed_prompt, max_running=options.max_running
        )

    # By name, since the package is in an extra of its own.
    module = importlib.import_module("seed_multimodal.inference.backends.llama_cpp")
    backend = module.LlamaCppBackend(
        llm_folder,
        tokenizer.vocabulary,
        options.gguf,
        max_rows=options.max_running,
        cache_bytes=options.cache_bytes,
    )
    return Engine(backend, tokenizer)
