"""`LlamaCppBackend`: scores by llama.cpp; each row of the cache is one of its sequences."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from seed_multimodal.entry import MAX_RUNNING
from seed_multimodal.errors import CheckpointError, ConfigError, GenerationError
from seed_multimodal.inference.backends.base import CPU_BYTES, NextTokens, PromptChunk, plan_cache
from seed_multimodal.inference.gguf import llama_cpp_config
from seed_multimodal.inference.prompt import Prompt
from seed_multimodal.language.llm import check_vocab_size, head_dim
from seed_multimodal.language.vocabulary import ImageVocabulary

BYTES_PER_VALUE = 2  # keys and values are float16
BATCH = 512  # tokens of a call


def find_gguf(folder: str | Path, file: str | Path | None = None) -> Path:
    """The `file`, or the only one in the language model's folder."""
    files = [Path(file)] if file else sorted(Path(folder).glob("*.gguf"))
    if len(files) > 1:
        raise ConfigError(f"{folder}: holds {len(files)} *.gguf files; choose one with --gguf.")
    if not files or not files[0].is_file():
        raise CheckpointError(f"{file or folder}: no GGUF file; create it by `seed export-gguf`.")
    return files[0]


class LlamaCppBackend:
    """A SEED-LLaMA exported by `export_gguf`, on the CPU or the GPU that llama.cpp was built for.

    folder: of the language model, for its config.json. max_rows, cache_bytes: as of `TorchBackend`.
    """

    cheap_copies = False  # llama.cpp copies whole sequences only
    has_axes = False
    search = None
    device = torch.device("cpu")

    def __init__(
        self,
        folder: str | Path,
        vocabulary: ImageVocabulary,
        gguf: str | Path | None = None,
        *,
        max_rows: int = MAX_RUNNING,
        cache_bytes: int | None = None,
    ) -> None:
        import llama_cpp

        logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)
        config = llama_cpp_config(folder)
        check_vocab_size(config.vocab_size, vocabulary, str(folder))
        file = find_gguf(folder, gguf)
        self.context = int(config.max_position_embeddings)
        self.vocab_size = int(config.vocab_size)

        # 1. The weights, which must be those of the folder.
        model = llama_cpp.llama_model_load_from_file(
            bytes(file), llama_cpp.llama_model_default_params()
        )
        if not model:
            raise CheckpointError(f"{file}: llama.cpp cannot read it.")
        vocabulary_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        sizes = (
            vocabulary_size,
            llama_cpp.llama_model_n_embd(model),
            llama_cpp.llama_model_n_layer(model),
        )
        if sizes != (config.vocab_size, config.hidden_size, config.num_hidden_layers):
            raise CheckpointError(
                f"{file}: its words, width and layers {sizes} are not those of {folder}."
            )

        # 2. A cache of a fixed size.
        per_layer = 2 * BYTES_PER_VALUE * config.num_key_value_heads * head_dim(config)
        budget = CPU_BYTES if cache_bytes is None else cache_bytes
        self.cache_size = plan_cache(
            per_layer * config.num_hidden_layers, self.context, budget, max_rows
        )
        rows = self.cache_size.rows
        length = self.cache_size.length
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = rows * length
        settings.n_seq_max = rows
        settings.kv_unified = False
        settings.n_batch = BATCH
        settings.n_ubatch = BATCH
        settings.n_threads = torch.get_num_threads()
        settings.n_threads_batch = settings.n_threads
        self._llama = llama_cpp
        self._context = llama_cpp.llama_init_from_model(model, settings)
        if not self._context:
            raise CheckpointError(
                f"{file}: out of memory for {rows} conversations of {length} tokens."
            )
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        self._sequence_of_row = list(range(rows))
        weakref.finalize(self, _free, llama_cpp, self._context, model)

    def ready(self) -> AbstractContextManager[None]:
        return nullcontext()

    def weights(self) -> object:
        return None  # a file's, which stay

    def prepare(self, prompt: Prompt) -> list[int]:
        ids = [int(id) for id in prompt.ids]
        if not all(0 <= id < self.vocab_size for id in ids):
            raise IndexError(
                f"A token id of the prompt is outside the vocabulary of {self.vocab_size} tokens."
            )
        return ids

    def prefill(self, chunks: Sequence[PromptChunk]) -> NextTokens:
        tokens = [chunk.prompt_input[chunk.start : chunk.stop] for chunk in chunks]
        return self._run([chunk.row for chunk in chunks], tokens, [chunk.start for chunk in chunks])

    def decode(
        self, tokens: Sequence[int], slots: Sequence[int], position_ids: object = ()
    ) -> NextTokens:
        return self._run(range(len(tokens)), [[token] for token in tokens], slots)

    def swap(self, row_a: int, row_b: int, length_a: int, length_b: int) -> None:
        sequences = self._sequence_of_row
        sequence_a = sequences[row_a]
        sequences[row_a] = sequences[row_b]
        sequences[row_b] = sequence_a

    def clear(self, row: int) -> None:
        memory = self._llama.llama_get_memory(self._context)
        self._llama.llama_memory_seq_rm(memory, self._sequence_of_row[row], -1, -1)

    def _run(
        self, rows: Sequence[int], tokens: Sequence[Sequence[int]], starts: Sequence[int]
    ) -> NextTokens:
        """Read tokens into each of the rows; the scores are those after the last ones."""
        memory = self._llama.llama_get_memory(self._context)

        # 1. What the rows hold behind the starts is forgotten; the new tokens of all rows are put
        #    in one line: token, position, sequence, index of the row (-1: no scores).
        inputs: list[tuple[int, int, int, int]] = []
        for index, (row, row_tokens, start) in enumerate(zip(rows, tokens, starts, strict=True)):
            sequence = self._sequence_of_row[row]
            self._llama.llama_memory_seq_rm(memory, sequence, start, -1)
            last = len(row_tokens) - 1
            for offset, token in enumerate(row_tokens):
                inputs.append((token, start + offset, sequence, index if offset == last else -1))

        # 2. They are computed in batches.
        shape = (len(tokens), self.vocab_size)
        scores = torch.zeros(shape, dtype=torch.float32, device="cpu")
        for start in range(0, len(inputs), BATCH):
            self._run_batch(inputs[start : start + BATCH], scores)
        return NextTokens(scores, None)

    def _run_batch(self, inputs: Sequence[tuple[int, int, int, int]], scores: torch.Tensor) -> None:
        """One call of llama.cpp; writes the rows of `scores` `[B, V]` that it computes."""
        batch = self._batch
        batch.n_tokens = len(inputs)
        for index, (token, position, sequence, row) in enumerate(inputs):
            batch.token[index] = token
            batch.pos[index] = position
            batch.logits[index] = row >= 0
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
        code = self._llama.llama_decode(self._context, batch)
        if code:
            raise GenerationError(f"llama.cpp could not compute the next tokens (code {code}).")
        for index, (_, _, _, row) in enumerate(inputs):
            if row >= 0:
                logits = self._llama.llama_get_logits_ith(self._context, index)
                scores[row] = torch.from_numpy(np.ctypeslib.as_array(logits, (self.vocab_size,)))


def _free(llama_cpp: Any, context: Any, model: Any) -> None:
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
