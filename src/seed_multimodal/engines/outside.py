"""Stand-in for a language model outside of torch, and selection of its engine."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seed_multimodal.errors import ConfigError
from seed_multimodal.language.engine import Engine, Request
from seed_multimodal.language.tokenizer import MultimodalTokenizer


@dataclass
class StandIn:
    """Stand-in for the language model: its sizes; the embedding of an id is the id (exact in float32)."""

    config: Any
    device, dtype, weight, parameters = torch.device("cpu"), "of the engine", torch.zeros(0), tuple

    def get_input_embeddings(self) -> StandIn:
        return self

    def __call__(self, ids: Tensor) -> Tensor:
        """Ids [...] → [..., 1]."""
        return ids[..., None].float()


class OutsideEngine(Engine):
    """An engine without torch weights."""

    def _begin(self, requests: Sequence[Request]) -> None:
        if any(len(request.pair) > 1 for request in requests):
            raise ConfigError("Guidance needs --engine torch; leave it at 1 with another engine.")
        super()._begin(requests)

    def run(self, work: Callable[[], Any]) -> Any:
        raise ConfigError("Beams need --engine torch; leave num_beams at 1 with another engine.")


def open_engine(name: str, words: MultimodalTokenizer, folder: Any, *, url: str | None = None,
                gguf: str | Path | None = None) -> Any:
    """The engine "llama.cpp" (`gguf`, or the only such file in the language model's `folder`) or "openai" (`url`)."""
    module: Any = importlib.import_module(f"seed_multimodal.engines.{name.replace('.', '_')}")
    return module.OpenAIEngine(words, url) if name == "openai" else module.LlamaCppEngine(words, folder, gguf)
