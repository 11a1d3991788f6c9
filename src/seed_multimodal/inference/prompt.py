"""What a caller asks of the language model: `Prompt`, `GenerationSettings`."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from seed_multimodal.errors import ConfigError
from seed_multimodal.language.answer import AnswerReader
from seed_multimodal.language.text_tokenizer import TextTokenizer
from seed_multimodal.settings import SEEDS, fraction, non_negative, positive, setting

# Below it sampling is greedy (scores differ by more than 0.0001 of it); above the maximum scores
# overflow.
MIN_TEMPERATURE = 1e-5
MAX_TEMPERATURE = 1e5

EMPTY_TOKENS = 8  # at most inside of a stop text, such as special ones

NO_KEYS = np.zeros(0, dtype=np.int64)
HASH_FACTOR = np.int64(6364136223846793005)  # of Knuth's MMIX generator

# Features of an input image: embeddings, or what the family's `embed_features` turns into them (a
# tensor, or a dataclass that holds tensors).
ImageFeatures = Any
# A prompt as a backend reads it: embeddings [L, D], or ids.
PromptInput: TypeAlias = Tensor | Sequence[int]


class Stopped(Exception):  # noqa: N818 (a signal, not an error)
    """Raised for a request whose `should_stop` is true."""


@dataclass(frozen=True)
class GenerationSettings:
    """Generation settings; defaults of SEED-LLaMA's scripts, with well-formed images.

    They are checked where a system reads them (`Family.generation_settings`).

    min_new_tokens: no end token before; a text of `stop` ends an answer at any time.
    temperature, top_p: 0 means greedy.
    seed: None draws one from the operating system.
    guidance: classifier-free guidance against `Prompt.negative`; 1 is off (LaVIT's drawings).
    images: "auto": the model decides; "forced": append `<img>` to every prompt and return it as
    part of the answer; "never": the answer holds none.
    num_return_sequences: answers per prompt, with `seed`, `seed` + 1, …, or the best beams.
    constrain: images are well-formed, and no image token stands outside of an image.
    stop: texts that end an answer, as the opening of the prompt template's next turn.
    stop_token_ids: tokens that end an answer; None: `</s>`.
    answer_after: the end of a verdict (see `TaskPrompts`).
    stop_after: `stop` counts only behind this text, the end of a verdict.
    should_stop: called before each token, also while the request waits, and before each drawing;
    true ends the answer.
    """

    max_new_tokens: int = positive(512)
    min_new_tokens: int = non_negative(0)
    temperature: float = non_negative(1.0, maximum=MAX_TEMPERATURE)
    top_p: float = fraction(0.5)
    top_k: int = non_negative(50)  # 0: off
    num_beams: int = positive(1, maximum=1000)
    length_penalty: float = 1.0
    early_stopping: bool = False
    repetition_penalty: float = setting(1.0, above=0)
    guidance: float = non_negative(1.0, maximum=1000)
    num_return_sequences: int = positive(1, maximum=1000)
    do_sample: bool = True
    seed: int | None = setting(None, **SEEDS)
    images: str = setting("auto", choices=("auto", "forced", "never"))
    constrain: bool = True
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] | None = None
    stop_after: str = ""
    answer_after: str = ""
    should_stop: Callable[[], bool] | None = field(default=None, compare=False)

    @property
    def samples(self) -> bool:
        """Whether tokens are sampled."""
        return self.do_sample and self.temperature >= MIN_TEMPERATURE and self.top_p > 0


def random_seed() -> int:
    """A seed from the operating system: two requests never share one."""
    return secrets.randbits(63)


# ---- ends at texts


def ends_at_stop(
    tokenizer: TextTokenizer,
    settings: GenerationSettings,
    ids: Sequence[int],
    n_opening: int = 0,
) -> bool:
    """Whether the last one of an answer's tokens ends it at one of the settings' stops.

    n_opening: see `AnswerReader`.
    """
    # 1. In most steps no stop ends in the last token. A text has no more tokens than bytes, but
    #    for some without text. An image ends a broken one before it, whose text then counts.
    n_bytes = sum(len(stop.encode()) for stop in settings.stop)
    if not n_bytes:
        return False
    tail = tokenizer.decode(ids[-n_bytes - EMPTY_TOKENS :], skip_special_tokens=True)
    is_start = ids[-1] == tokenizer.vocabulary.boi_id
    if not is_start and not any(stop in tail for stop in settings.stop):
        return False

    # 2. Whether it counts.
    reader = AnswerReader(tokenizer, settings.stop, (), settings.stop_after, n_opening)
    for id in ids:
        reader.read(id)
    return reader.found_stop


def rows_end_at_stops(
    tokenizer: TextTokenizer,
    settings: GenerationSettings,
    ids: Tensor,
    initial_ids: Sequence[int] = (),
) -> Tensor:
    """Whether each row of generated ids `[B, n]` ends at a stop, behind these initial ids."""
    answers = [[*initial_ids, *row] for row in ids.tolist()]
    ended = [ends_at_stop(tokenizer, settings, row, len(initial_ids)) for row in answers]
    return ids.new_tensor(ended, dtype=torch.bool)


# ---- prompts


@dataclass(frozen=True)
class PromptImage:
    """Features of an input image, and where in the prompt's ids their embeddings stand."""

    features: ImageFeatures
    positions: Sequence[int]


@dataclass
class Prompt:
    """Input of the language model.

    ids: token ids, with `<s>` if the family uses it.
    images: the backend replaces the ids at their positions by embeddings of their features.
    answered: last tokens of the prompt that are part of the answer.
    negative: unconditional prompt for guidance, including `<img>`; None: `<img>` alone.
    source: the image that is edited.
    n_codes: of the answer's image; None: as many as the vocabulary has.
    position_ids: of a model whose positions have axes: `[A, L + N]`, of the prompt's tokens (with a
    forced `<img>`) and of those that follow; None: 0, 1, 2 …
    """

    ids: Sequence[int] = ()
    images: Sequence[PromptImage] = ()
    answered: Sequence[int] = ()
    negative: Sequence[int] | None = None
    source: Any = None
    n_codes: int | None = None
    position_ids: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def answered_with(self, ids: Sequence[int]) -> Prompt:
        """The prompt with `ids` at its end, which are part of the answer.

        Raises ConfigError: its positions are those of a complete prompt.
        """
        if ids and self.position_ids is not None:
            raise ConfigError("The answer to a prompt with positions cannot be begun.")
        return replace(self, ids=[*self.ids, *ids], answered=[*self.answered, *ids])

    @classmethod
    def of_embeddings(cls, embeddings: Tensor) -> Prompt:
        """A prompt of embeddings `[n, D]` alone (of a backend whose features are embeddings)."""
        count = len(embeddings)
        return cls([0] * count, [PromptImage(embeddings, range(count))])

    def prefix_keys(self) -> np.ndarray:
        """One int64 a token, equal for equal inputs: ids, and hashes at the images' positions.

        With `position_ids` hashes of the token and of its positions.
        """
        keys = np.array(self.ids, dtype=np.int64)
        for image in self.images:
            # Hashed positions are negative, so that they equal no token id.
            first_key = -1 - _fingerprint(image.features)
            keys[list(image.positions)] = first_key - np.arange(len(image.positions))
        if self.position_ids is not None:
            for axis in self.position_ids[:, : len(keys)].numpy().astype(np.int64):
                keys = keys * HASH_FACTOR + axis  # modulo 2**64
        return keys


def _fingerprint(features: ImageFeatures) -> int:
    """A hash of a tensor, or of the tensors in a dataclass; 56 bits."""
    tensors = [features]
    if not isinstance(features, Tensor):
        tensors = [value for value in vars(features).values() if isinstance(value, Tensor)]
    digest = hashlib.blake2b(digest_size=7)
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return int.from_bytes(digest.digest(), "big")
