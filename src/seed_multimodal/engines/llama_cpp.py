"""`LlamaCppEngine`: logits by llama.cpp; constraints, sampling, stops and prefix reuse as in `Engine`."""

from __future__ import annotations

import logging
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seed_multimodal.engines.outside import OutsideEngine, StandIn
from seed_multimodal.errors import CheckpointError, ConfigError, GenerationError
from seed_multimodal.language.llama import llama_config
from seed_multimodal.language.tokenizer import MultimodalTokenizer

CACHE_BYTES = 1 << 30  # of the KV cache; limits the number of rows
BATCH = 512  # tokens of a call


class Sequences:
    """llama.cpp's cache as `SlotCache`: rows are sequences, swapped by id without moving data."""

    def __init__(self) -> None:
        self.ids = torch.zeros(0, dtype=torch.long)  # the sequence of each row
        self.first, self.length, self.copies = 0, 0, False  # llama.cpp copies whole sequences only

    def grow(self, slots: int, length: int) -> None:
        self.length = max(self.length, length)
        self.ids = torch.cat([self.ids, torch.arange(len(self.ids), slots)])

    def swap(self, one: int, other: int, length: int) -> None:
        self.ids[[one, other]] = self.ids[[other, one]]


def find_gguf(folder: str | Path, file: str | Path | None = None) -> Path:
    """The `file`, or the only one in the language model's folder."""
    files = [Path(file)] if file else sorted(Path(folder).glob("*.gguf"))
    if len(files) > 1:
        raise ConfigError(f"{folder}: holds {len(files)} *.gguf files; choose one with --gguf.")
    if not files or not files[0].is_file():
        raise CheckpointError(f"{file or folder}: no GGUF file; create it by `seed export-gguf`.")
    return files[0]


class LlamaCppEngine(OutsideEngine):
    """Answers of a SEED-LLaMA exported by `export_gguf`; on the CPU, or the GPU that llama.cpp was built for."""

    cache: Any

    def __init__(self, tokenizer: MultimodalTokenizer, folder: str | Path, gguf: str | Path | None = None,
                 slots: int = 0) -> None:
        import llama_cpp

        logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)
        config, file = llama_config(folder, tokenizer.vocabulary), find_gguf(folder, gguf)
        length, width = config.max_position_embeddings, config.num_key_value_heads * config.head_dim
        slots = slots or min(16, max(1, CACHE_BYTES // (4 * length * width * config.num_hidden_layers)))
        super().__init__(StandIn(config), tokenizer, slots)
        self.slots, self.cache = slots, Sequences()
        if not (model := llama_cpp.llama_model_load_from_file(bytes(file), llama_cpp.llama_model_default_params())):
            raise CheckpointError(f"{file}: llama.cpp cannot read it.")
        sizes = (llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model)),
                 llama_cpp.llama_model_n_embd(model), llama_cpp.llama_model_n_layer(model))
        if sizes != (config.vocab_size, config.hidden_size, config.num_hidden_layers):
            raise CheckpointError(f"{file}: its words, width and layers {sizes} are not those of {folder}.")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max, settings.kv_unified = slots * length, slots, False
        settings.n_batch = settings.n_ubatch = BATCH
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        self._context, self._batch = llama_cpp.llama_init_from_model(model, settings), llama_cpp.llama_batch_init(
            BATCH, 0, 1)
        if not self._context:
            raise CheckpointError(f"{file}: out of memory for {slots} conversations of {length} tokens.")
        weakref.finalize(self, lambda context: (llama_cpp.llama_free(context), llama_cpp.llama_model_free(model)),
                         self._context)

    def _pass(self, embeds: Tensor, positions: Tensor, last: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """As of `Engine`; the states are empty."""
        import llama_cpp

        tokens: list[tuple[int, int, int, bool]] = []  # id, position, sequence, whether logits are needed
        memory, batch, scores = llama_cpp.llama_get_memory(self._context), self._batch, list[Any]()
        for row, sequence in enumerate(self.cache.ids[self.cache.first:][:len(embeds)].tolist()):
            count, start = int(last[row]) + 1, int(positions[row, 0])
            llama_cpp.llama_memory_seq_rm(memory, sequence, start, -1)
            tokens += [(id, start + place, sequence, place == count - 1)
                       for place, id in enumerate(embeds[row, :count, 0].int().tolist())]
        for part in (tokens[start:start + BATCH] for start in range(0, len(tokens), BATCH)):
            batch.n_tokens = len(part)
            for place, (id, position, sequence, wanted) in enumerate(part):
                batch.token[place], batch.pos[place], batch.logits[place] = id, position, wanted
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, sequence
            if code := llama_cpp.llama_decode(self._context, batch):
                raise GenerationError(f"llama.cpp could not compute the next tokens (code {code}).")
            rows = [llama_cpp.llama_get_logits_ith(self._context, place) for place, one in enumerate(part) if one[3]]
            scores += [np.ctypeslib.as_array(row, (self.llm.config.vocab_size,)).copy() for row in rows]
        return torch.from_numpy(np.stack(scores)), embeds.new_zeros(len(last), 0)
