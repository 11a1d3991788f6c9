"""`TorchBackend`: a transformers language model with a static KV cache."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from seed_multimodal.device import on_device
from seed_multimodal.entry import MAX_RUNNING
from seed_multimodal.errors import ConfigError, first_line
from seed_multimodal.inference.backends.base import (
    GIB,
    CacheSize,
    NextTokens,
    PromptChunk,
    default_budget,
    plan_cache,
)
from seed_multimodal.inference.base_engine import NO_SCORES, GeneratedSequence
from seed_multimodal.inference.batching import weights_state
from seed_multimodal.inference.prompt import ImageFeatures, Prompt, rows_end_at_stops
from seed_multimodal.inference.sampling import LogitsProcessor
from seed_multimodal.language.llm import FULL, SLIDING, check_sizes, head_dim, output_scores
from seed_multimodal.language.text_tokenizer import TextTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from seed_multimodal.language.llm import LanguageModel

# Tables of up to this size in all are written at load: page faults would slow the first answers.
EAGER_BYTES = GIB // 8
SPAN_STEP = 16  # attention reads a multiple of so many positions
# Compiled, it reads this number or twice, four times … as many, so that few graphs are made.
COMPILED_SPAN = 128
# Architectures of which all scores are known to equal transformers'; others are checked at load.
CHECKED_ARCHITECTURES = ("llama",)
PROBE_IDS = (3, 5, 4, 6, 3, 7)
MAX_DIFFERENCE = 0.05  # of the check's scores, in their standard deviations
# Of a model whose attention adds the mask to the scores; the others take a boolean one.
ADDITIVE = "eager"


def joined(features: Sequence[Tensor]) -> Tensor:
    """Features that are embeddings already, one row each."""
    return torch.cat(list(features))


def embed_prompt(
    prompt: Prompt,
    embed: nn.Module,
    embed_features: Callable[[Sequence[ImageFeatures]], Tensor] = joined,
) -> Tensor:
    """Embeddings `[L, D]` of a prompt's ids by `embed`, and of its image features."""
    device = next(embed.parameters()).device
    embeddings: Tensor = embed(torch.tensor(list(prompt.ids), dtype=torch.long, device=device))
    if prompt.images:
        positions: list[int] = []
        for image in prompt.images:
            positions += image.positions
        features = embed_features([image.features for image in prompt.images])
        embeddings[positions] = features.to(embeddings)
    return embeddings


class TorchBackend:
    """Computes with `llm`, a decoder-only transformers model with `inputs_embeds`.

    max_rows: sequences at once (guidance takes two).
    cache_bytes: for keys and values; None: see `default_budget`. context: tokens of a row at most.
    compiled: `torch.compile` computes the tokens (on CUDA as CUDA graphs); the first token then
        takes from seconds to minutes.
    device: where the model computes if it rests on the CPU (off-loading).
    embed_features: a prompt's image features → embeddings `[n, D]`.
    """

    cheap_copies = True
    has_axes = True

    def __init__(
        self,
        llm: LanguageModel,
        *,
        max_rows: int = MAX_RUNNING,
        cache_bytes: int | None = None,
        context: int | None = None,
        compiled: bool = False,
        device: torch.device | None = None,
        embed_features: Callable[[Sequence[ImageFeatures]], Tensor] = joined,
    ) -> None:
        self.llm = llm
        self.compiled = compiled
        self._masks = AttentionMasks(llm.config)
        self.context = min(_context(llm.config), context or sys.maxsize)
        self.device = device or llm.device
        self._offload_device = device
        self._n_loads = 0  # of an off-loaded model, whose cache is then empty
        self._embed_features = embed_features

        # The cache: `cache_bytes` hold rows of all layers' keys and values.
        if cache_bytes is None:
            cache_bytes = default_budget(self.device)
        config = llm.config
        self._n_layers = int(config.num_hidden_layers)
        n_heads = int(config.num_attention_heads)
        self._n_kv_heads = int(getattr(config, "num_key_value_heads", None) or n_heads)
        self._head_dim = head_dim(config)
        values_per_layer = 2 * self._n_kv_heads * self._head_dim
        bytes_per_token = self._n_layers * values_per_layer * llm.dtype.itemsize
        self.cache_size = plan_cache(bytes_per_token, self.context, cache_bytes, max_rows)
        self._open_cache()
        if llm.config.model_type not in CHECKED_ARCHITECTURES:
            self._check_scores()

    def _open_cache(self) -> None:
        self.cache = KVCache(self.cache_size)
        if self._offload_device is None:
            self._allocate_cache()
        self._decode_pass = self._decode
        if self.compiled:
            self._decode_pass = torch.compile(self._decode, mode="reduce-overhead")

    def __getstate__(self) -> dict[str, object]:
        """For copies and pickles, which get a cache of their own."""
        return {**vars(self), "cache": None, "_decode_pass": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._open_cache()

    def _allocate_cache(self) -> None:
        self.cache.allocate(
            self._n_layers, self._n_kv_heads, self._head_dim, self.llm.dtype, self.device
        )

    def _check_scores(self) -> None:
        """Raise ConfigError unless a prompt, read in two pieces, gets transformers' scores."""
        label = f"a language model of the type {self.llm.config.model_type}"
        try:
            scores, expected = self._probe()
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 whatever a foreign decoder's arguments cause
            raise ConfigError(
                f"The torch engine cannot run {label} ({first_line(error)})."
            ) from error
        if not (scores - expected).abs().max() <= MAX_DIFFERENCE * expected.std():
            raise ConfigError(f"The torch engine computes wrong scores for {label}.")

    def _probe(self) -> tuple[Tensor, Tensor]:
        """Scores `[V]` after a short prompt, ours and transformers'."""
        prompt = Prompt([id % self.llm.config.vocab_size for id in PROBE_IDS])
        length = len(prompt) - 1  # of the first piece
        with self.ready():
            embeddings = self.prepare(prompt)
            self.prefill([PromptChunk(0, embeddings, 0, length)])
            scores = self.prefill([PromptChunk(0, embeddings, length, len(prompt))]).scores
            ids = torch.tensor([prompt.ids], dtype=torch.long, device=embeddings.device)
            expected = self.llm(ids, use_cache=False).logits
        return scores[0], expected[0, -1].float()

    @contextmanager
    def ready(self) -> Iterator[None]:
        with torch.inference_mode():
            if self._offload_device is None:
                yield
                return
            # Off-loading: weights and cache are on the device only while there is work.
            with on_device(self.llm, self._offload_device):
                self._n_loads += 1
                try:
                    self._allocate_cache()
                    yield
                finally:
                    self.cache.release()

    def weights(self) -> object:
        return self._n_loads, weights_state(self.llm)

    def prepare(self, prompt: Prompt) -> Tensor:
        return embed_prompt(prompt, self.llm.get_input_embeddings(), self._embed_features)

    def prefill(self, chunks: Sequence[PromptChunk]) -> NextTokens:
        # 1. All pieces are one sequence, without padding; each token sees those before it in its
        #    own row of the cache.
        rows: list[int] = []  # of each token
        positions: list[int] = []
        seen_rows: list[int] = []
        seen_positions: list[int] = []
        last: list[int] = []  # token of each piece
        for chunk in chunks:
            rows += [chunk.row] * (chunk.stop - chunk.start)
            positions += range(chunk.start, chunk.stop)
            seen_rows += [chunk.row] * chunk.stop
            seen_positions += range(chunk.stop)
            last.append(len(rows) - 1)
        pieces = [chunk.prompt_input[chunk.start : chunk.stop] for chunk in chunks]
        embeddings = torch.cat(pieces)[None]  # [1, n, D]
        device = embeddings.device
        table = torch.tensor([rows, positions], dtype=torch.long, device=device)
        table = table[:, None]  # [2, 1, n]
        seen = torch.tensor([seen_rows, seen_positions], dtype=torch.long, device=device)[:, None]

        # 2. The model.
        self.cache.span = (seen[0], seen[1])
        is_own = table[0, 0, :, None] == seen[0]  # [n, K]
        position_ids = None
        if any(chunk.position_ids is not None for chunk in chunks):
            spans = [(chunk.start, chunk.stop, chunk.position_ids) for chunk in chunks]
            position_ids = _joined_position_ids(spans)[:, None].to(device)  # [A, 1, n]
        states = self._states_of(
            embeddings, table[0], table[1], seen[1, 0], is_own, position_ids=position_ids
        )[0, last]
        return NextTokens(output_scores(self.llm, states), states)

    def decode(
        self,
        tokens: Sequence[int],
        slots: Sequence[int],
        position_ids: Sequence[Tensor | None] = (),
    ) -> NextTokens:
        # 1. Slots that attention reads, and rows that are computed; few numbers of both are
        #    compiled: powers of two.
        end = max(slots) + 1
        n_rows = len(tokens)
        n_padding = 0
        span = -(-end // SPAN_STEP) * SPAN_STEP
        if self.compiled:
            span = max(COMPILED_SPAN, 1 << (end - 1).bit_length())
            n_padding = min(1 << (n_rows - 1).bit_length(), self.cache_size.rows) - n_rows
        span = min(span, self.cache_size.length)

        # 2. The tokens. Keys and values of padding are written to the last position, which no token
        #    sees.
        embed = self.llm.get_input_embeddings()
        device = embed.weight.device
        ids = torch.tensor([*tokens, *([0] * n_padding)], dtype=torch.long, device=device)
        padding = [self.cache_size.length - 1] * n_padding
        arguments = [
            embed(ids[:, None]),
            torch.tensor([*slots, *padding], dtype=torch.long, device=device)[:, None],
            torch.arange(span, device=device),
        ]
        if any(plan is not None for plan in position_ids):
            spans = [(slot, slot + 1, plan) for slot, plan in zip(slots, position_ids, strict=True)]
            joined_ids = F.pad(_joined_position_ids(spans), (0, n_padding))
            arguments.append(joined_ids.T[..., None].to(device))
        if self.compiled:  # one graph for any number of rows and positions
            for tensor in arguments:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        scores, states = self._decode_pass(*arguments)
        return NextTokens(scores[:n_rows], states)

    def copy(self, source: int, target: int, length: int) -> None:
        self.cache.copy(source, target, length)

    def swap(self, row_a: int, row_b: int, length_a: int, length_b: int) -> None:
        # Most exchanges are with a row that holds nothing.
        if length_b == 0:
            self.cache.copy(row_a, row_b, length_a)
        elif length_a == 0:
            self.cache.copy(row_b, row_a, length_b)
        else:
            self.cache.swap(row_a, row_b, max(length_a, length_b))

    def clear(self, row: int) -> None:
        self.cache.clear(row)

    # ---- beams

    def search(
        self,
        sequences: Sequence[GeneratedSequence],
        processors: Sequence[LogitsProcessor],
        tokenizer: TextTokenizer,
        all_ended: Callable[[], bool],
    ) -> None:
        """Set the best answers of sequences with equal settings, by transformers' beam search.

        processors: of their scores, behind those of the settings.
        all_ended: called at each token; true ends the search.
        """
        # 1. When a search ends, and how it samples.
        first = sequences[0]
        settings = first.settings

        def is_complete(ids: Tensor, scores: object, **kwargs: object) -> Tensor:
            return rows_end_at_stops(tokenizer, settings, ids, first.initial_ids) | all_ended()

        sampling: dict[str, object] = {}
        if first.seed is not None:
            sampling = {name: getattr(settings, name) for name in ("temperature", "top_p", "top_k")}

        # 2. The search, of prompts padded at the left. Sampled beams have a seed of their own.
        prompts = [self.prepare(sequence.prompts[0]) for sequence in sequences]
        masks = [prompt.new_ones(len(prompt), dtype=torch.long) for prompt in prompts]
        embeddings = pad_sequence(prompts, batch_first=True, padding_side="left")  # [B, n, D]
        mask = pad_sequence(masks, batch_first=True, padding_side="left")
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(first.seed or 0)
            rows = self.llm.generate(
                inputs_embeds=embeddings,
                attention_mask=mask,
                max_new_tokens=first.budget,
                num_beams=settings.num_beams,
                num_return_sequences=settings.num_return_sequences,
                length_penalty=settings.length_penalty,
                early_stopping=settings.early_stopping,
                min_new_tokens=settings.min_new_tokens,
                repetition_penalty=settings.repetition_penalty,
                eos_token_id=first.end_ids or None,
                pad_token_id=tokenizer.pad_token_id,
                logits_processor=list(processors),
                stopping_criteria=[is_complete],
                do_sample=first.seed is not None,
                **sampling,
            ).tolist()

        # 3. The answers of each sequence, and the states of its first one.
        n_answers = settings.num_return_sequences
        for index, (sequence, prompt) in enumerate(zip(sequences, prompts, strict=True)):
            answers = rows[index * n_answers : (index + 1) * n_answers]
            answers = [_up_to_end(ids, sequence.end_ids) for ids in answers]
            sequence.answers = [[*sequence.initial_ids, *ids] for ids in answers]
            if sequence.states is not None:
                sequence.states = list(self._states(prompt, answers[0]))

    def _states(self, prompt: Tensor, ids: Sequence[int]) -> Tensor:
        """The states `[len(ids), D]` from which each of these tokens was chosen."""
        token_ids = torch.tensor(ids, dtype=torch.long, device=prompt.device)
        embedded = self.llm.get_input_embeddings()(token_ids)
        inputs = torch.cat([prompt, embedded])[None]
        states = self.llm.get_decoder()(inputs_embeds=inputs, use_cache=False)[0]
        return states[0, len(prompt) - 1 : -1]

    # ---- one pass

    def _decode(
        self, embeddings: Tensor, slots: Tensor, span: Tensor, position_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Scores `[B, V]` and last hidden states `[B, D]` of a token in each of the first rows.

        embeddings: `[B, 1, D]`. slots: theirs `[B, 1]`; they see the `span` `[K]` up to these.
        position_ids: `[B, A, 1]`.
        """
        # Set here, where it is traced: outside, torch.compile would make a graph for each value.
        rows = torch.arange(len(slots), device=slots.device)[:, None]
        self.cache.span = len(span)
        if position_ids is not None:
            position_ids = position_ids.transpose(0, 1)
        states = self._states_of(embeddings, rows, slots, span, position_ids=position_ids)[:, -1]
        return output_scores(self.llm, states), states

    def _states_of(
        self,
        embeddings: Tensor,
        rows: Tensor,
        slots: Tensor,
        seen: Tensor,
        is_own: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Last hidden states `[B, n, D]` of tokens, which the cache gets at rows and slots
        `[B, n]`.

        seen, is_own: see `AttentionMasks`. position_ids: `[A, B, n]`; None: the slots.
        """
        self.cache.written = (rows, slots)
        output = self.llm.get_decoder()(
            None,
            self._masks(slots, seen, embeddings.dtype, is_own),
            slots if position_ids is None else position_ids,
            self.cache,  # by position: its name changed in transformers 5.24
            inputs_embeds=embeddings,
            use_cache=True,
        )
        return output.last_hidden_state


class KVCache:
    """Keys and values of every layer, `[rows, heads, length, head_dim]` each.

    `allocate` makes the tables, once; transformers' models call `update`.

    written: rows and positions `[B, n]` of the next pass's tokens.
    span: what they see: so many positions of each of the first rows, or the rows and positions
    `[1, K]` of tokens for a single sequence of several prompts.
    """

    is_compileable = False  # asked by transformers; the engine compiles its own step

    def __init__(self, size: CacheSize) -> None:
        self.size = size
        self.layers: list[tuple[Tensor, Tensor]] = []
        self._spare_row = NO_SCORES  # [heads, length, head_dim]
        self.written: tuple[Tensor, Tensor] = (NO_SCORES, NO_SCORES)
        self.span: int | tuple[Tensor, Tensor] = 0

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values `[B, heads, n, head_dim]`; returns those of the span."""
        # Rows and positions are indexed together, so heads come behind them: [B, n, heads, D].
        rows, positions = self.written
        seen: list[Tensor] = []
        for table, new in zip(self.layers[layer], (keys, values), strict=True):
            table[rows, :, positions] = new.transpose(1, 2).to(table.dtype)
            if isinstance(self.span, int):
                seen.append(table[: len(new), :, : self.span])
            else:
                seen_rows, seen_positions = self.span
                seen.append(table[seen_rows, :, seen_positions].transpose(1, 2))
        return seen[0], seen[1]

    def get_seq_length(self, layer: int = 0) -> int:
        return self.span if isinstance(self.span, int) else self.span[0].shape[1]

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first positions of one row to another."""
        for layer in self.layers:
            for table in layer:
                table[target, :, :length] = table[source, :, :length]

    def swap(self, row_a: int, row_b: int, length: int) -> None:
        """Exchange the first positions of two rows, without new memory: it cannot fail half-way."""
        content_a = self._spare_row[:, :length]
        for layer in self.layers:
            for table in layer:
                content_a.copy_(table[row_a, :, :length])
                table[row_a, :, :length] = table[row_b, :, :length]
                table[row_b, :, :length] = content_a

    def clear(self, row: int) -> None:
        """Zero a row: NaN in masked positions would reach the next sequence there."""
        for layer in self.layers:
            for table in layer:
                table[row].zero_()

    def allocate(
        self, n_layers: int, n_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Make the tables, of zeros: what attention masks has to be finite.

        Large ones on a CPU take memory only where they are written, page by page.
        """
        shape = (self.size.rows, n_heads, self.size.length, head_dim)
        n_bytes = 2 * n_layers * math.prod(shape) * dtype.itemsize
        is_lazy = device.type == "cpu" and n_bytes > EAGER_BYTES
        zeros = _lazy_zeros if is_lazy else torch.zeros
        for _ in range(n_layers):
            tables = []
            for _ in ("keys", "values"):
                table = zeros(shape, dtype=dtype, device=device)
                torch._dynamo.mark_static_address(table)  # CUDA graphs write to it in place
                tables.append(table)
            self.layers.append((tables[0], tables[1]))
        self._spare_row = zeros(shape[1:], dtype=dtype, device=device)

    def release(self) -> None:
        """Give the memory of the tables back."""
        self.layers.clear()
        self._spare_row = NO_SCORES


def _joined_position_ids(pieces: Sequence[tuple[int, int, Tensor | None]]) -> Tensor:
    """Position ids `[A, n]` of the tokens in pieces of rows, in those without a plan their slots.

    pieces: first slot, the one behind the last, and the row's plan (see `Prompt.position_ids`), of
    which one has one.
    """
    n_axes = next(len(plan) for _, _, plan in pieces if plan is not None)
    columns: list[Tensor] = []
    for start, stop, plan in pieces:
        slots = torch.arange(start, stop, device="cpu").expand(n_axes, -1)
        columns.append(slots if plan is None else plan[:, start:stop])
    return torch.cat(columns, dim=1)


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros on the CPU in memory that the kernel provides when it is first written."""
    n_bytes = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(n_bytes, dtype=np.uint8)).view(dtype).view(shape)


class AttentionMasks:
    """Builds what `config`'s decoder takes as `attention_mask`.

    window: how far back layers with sliding attention see; None: there are none.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        layer_types = set(getattr(config, "layer_types", None) or ())
        # A decoder with layer types takes a mask for each; others have one window for all layers.
        self._by_layer_type = SLIDING in layer_types
        self.window: int | None = None
        if self._by_layer_type or not layer_types:
            self.window = getattr(config, "sliding_window", None)
        self._config = config  # the implementation of attention may be changed later

    def __call__(
        self, positions: Tensor, seen: Tensor, dtype: torch.dtype, is_own: Tensor | None = None
    ) -> Tensor | dict[str, Tensor]:
        """Masks `[B, 1, n, K]` of tokens at `positions` `[B, n]`.

        seen: positions of the keys `[K]`. is_own `[n, K]`: which keys are of a token's own prompt;
        None: all.
        dtype: of the model.
        """
        # 1. True where a query sees a key.
        queries = positions[:, None, :, None]  # [B, 1, n, 1]
        full = seen <= queries
        if is_own is not None:
            full = full & is_own
        sliding = full
        if self.window is not None:
            sliding = full & (seen > queries - self.window)

        # 2. By layer type, and as the attention implementation takes them.
        masks = {SLIDING: sliding}
        if self._by_layer_type:
            masks[FULL] = full
        if getattr(self._config, "_attn_implementation", None) == ADDITIVE:
            hidden = torch.finfo(dtype).min
            for name, visible in masks.items():
                zeros = torch.zeros_like(visible, dtype=dtype)
                masks[name] = zeros.masked_fill(~visible, hidden)
        return masks if self._by_layer_type else masks[SLIDING]


def _up_to_end(ids: list[int], end_ids: Sequence[int]) -> list[int]:
    """Generated ids without the padding behind the token that ended them."""
    ends = [index for index, id in enumerate(ids) if id in end_ids]
    return ids[: ends[0] + 1] if ends else ids


def _context(config: PreTrainedConfig) -> int:
    """Positions of the model. Raises CheckpointError: not a transformer with attention."""
    check_sizes(config, "The torch engine")
    context = int(config.max_position_embeddings)
    # Beyond its first context such a model rotates all positions differently.
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        context = min(context, int(getattr(config, "original_max_position_embeddings", context)))
    return context
