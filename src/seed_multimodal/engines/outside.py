"""What stands in for a language model that torch does not hold, and the choice of its engine."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seed_multimodal.errors import ConfigError
from seed_multimodal.language.engine import Engine
from seed_multimodal.language.tokenizer import MultimodalTokenizer

ENGINES = {"llama.cpp": "llama_cpp:LlamaCppEngine", "openai": "openai:OpenAIEngine"}


class StandIn:
    """In place of the language model: its sizes, and as the embedding of an id the id itself (float32 holds them
    exactly), so that rows of the engine are compared as with embeddings."""

    device = torch.device("cpu")
    weight = torch.zeros(0)

    def __init__(self, config: Any) -> None:
        self.config = config

    def get_input_embeddings(self) -> StandIn:
        return self

    def parameters(self) -> Iterator[Tensor]:
        return iter(())

    def __call__(self, ids: Tensor) -> Tensor:
        """Ids [...] → [..., 1]."""
        return ids[..., None].float()


class OutsideEngine(Engine):
    """An engine without torch weights."""

    def run(self, work: Callable[[], Any]) -> Any:
        raise ConfigError("Beams need --engine torch; leave num_beams at 1 with another engine.")


def open_engine(name: str, words: MultimodalTokenizer, folder: str | Path, *, url: str | None = None,
                gguf: str | Path | None = None) -> OutsideEngine:
    """The engine "llama.cpp" (`gguf`, or the only such file in the language model's `folder`) or "openai" (`url`)."""
    if name not in ENGINES:
        raise ConfigError(f"Unknown engine {name!r}: use torch, {', '.join(ENGINES)}.")
    module, _, kind = ENGINES[name].partition(":")
    made: OutsideEngine = getattr(importlib.import_module(f"seed_multimodal.engines.{module}"), kind)(
        words, folder if name == "llama.cpp" else url, *([gguf] if name == "llama.cpp" else []))
    return made
