"""LaVIT's words, its prompts, and what becomes of its answers.

    0 … 31999   text pieces (0 <unk>, 1 <s>, 2 </s>, which also pads)
    32000/32001 start and end of a picture
    32002 + k   visual code k; a picture has 1 … 256 of them

Image words are numbers only: no text stands for them. No prompt begins with `<s>`.

    caption   [picture's padding] start, features, end [text's padding] text        text is optional
    answer    [text's padding] [picture's padding] start, features, end, text
    drawing   text and codes in order, start                                        continued with codes, end

All padding is on the left and masked, so that places are counted over the rest: a picture alone gives what it gives in
a batch. Captions end at the first ".", answers at the first of several words. Source: arXiv 2309.04669 and the
behaviour of its released programs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from seed_multimodal.errors import (
    CheckpointError,
    CodesError,
    RequestError,
)
from seed_multimodal.language.padding import embeds_padded_left, padded_left
from seed_multimodal.language.tokenizer import (
    CONFIG,
    MultimodalTokenizer,
    plain_text,
    read_text_files,
    train_model,
    write_files,
)
from seed_multimodal.language.vocabulary import ImageVocabulary
from seed_multimodal.language.words import question_text
from seed_multimodal.settings import check_settings, check_value, setting

Side = Literal["caption", "answer"]
Embed = Callable[[Tensor], Tensor]  # ids [B, L] → [B, L, D]
QUESTION = "Question: {} Answer:"
ANSWER_ENDS = ("\n", "question:", "Long answer:", ",", ".")  # an answer ends before them, looked for in this order


@dataclass(frozen=True)
class LavitWords(ImageVocabulary):
    """LaVIT's ids; the defaults are the released ones.

    Attributes:
        n_text: text pieces.
        n_codes: visual codes.
        tokens_per_image: the most codes a picture may have: the number of its patches.
    """

    n_codes: int = 16384
    tokens_per_image: int = 256

    @property
    def boi_id(self) -> int:
        """Id of a picture's start."""
        return self.n_text

    @property
    def code_start(self) -> int:
        """Id of code 0."""
        return self.n_text + 2

    def check_codes(self, codes: Sequence[int]) -> list[int]:
        """The codes of one picture as plain ints, 1 to `tokens_per_image` of them; raises CodesError otherwise."""
        if not 1 <= len(codes) <= self.tokens_per_image:
            raise CodesError(f"A picture has 1 to {self.tokens_per_image} codes, not {len(codes)}.")
        return [id - self.code_start for id in self.code_to_id(codes)]

    def image_text(self, codes: Iterable[int]) -> str:
        """No text stands for LaVIT's image words: raises CodesError."""
        raise CodesError("LaVIT's image codes cannot be written as text; give them as numbers.")

    def codes_of(self, ids: Iterable[int]) -> Tensor:
        """The codes among any ids, int64 [n]: text, start, end, padding and rows beyond the codebook are left out."""
        return torch.tensor([int(id) - self.code_start for id in ids if self.is_code_id(int(id))], dtype=torch.long)

    def check_rows(self, rows: int, source: str | Path) -> None:
        """Refuse a language model with fewer words; more are padding, and never written.

        Raises:
            CheckpointError: too few `rows` of its embedding table.
        """
        if rows < self.size:
            raise CheckpointError(f"{source}: the language model has {rows} words, but {self.n_text} text pieces, "
                                  f"start, end and {self.n_codes} codes are {self.size}; they do not belong together.")


class LavitTokenizer(MultimodalTokenizer):
    """A plain LLaMA tokenizer beside `LavitWords`: text ⇄ ids without `<s>`; image words are left out of texts."""

    pad_id = 2
    vocabulary: LavitWords

    @classmethod
    def from_pretrained(cls, folder: str | Path, words: LavitWords | None = None) -> LavitTokenizer:
        """Read `tokenizer.model` and the optional configuration files of a folder.

        Args:
            words: another layout than the released one or that of the folder (`train`).

        Raises:
            CheckpointError: a file that is missing or damaged; more pieces than `words` has text.
        """

        def layout(pieces: int, config: dict[str, Any]) -> LavitWords:
            sizes = {name: check_value(int, config[key], f"{folder}/{CONFIG}: {key}", least=1)
                     for name, key in (("n_codes", "image_codes"), ("tokens_per_image", "tokens_per_image"))
                     if key in config}
            found = words or (LavitWords(pieces, **sizes) if sizes else LavitWords())
            if pieces > found.n_text:
                raise CheckpointError(f"{folder}: the tokenizer has {pieces} pieces, but the model's image words begin "
                                      f"at {found.n_text}.")
            return found

        return cls(read_text_files(Path(folder), layout))

    @classmethod
    def train(cls, texts: Iterable[str], folder: str | Path, vocab_size: int, n_codes: int,
              tokens_per_image: int = 256, n_locations: int = 0) -> LavitTokenizer:
        """See `MultimodalTokenizer.train`; the image words stand behind the pieces and have no spelling."""
        write_files(Path(folder), train_model(texts, vocab_size), n_codes, tokens_per_image, spelled=False)
        return cls.from_pretrained(folder)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Ids → text."""
        pieces = self._sp.GetPieceSize()
        return super().decode([id for id in self.checked_ids(ids) if id < pieces], skip_special_tokens)

    def text_ids(self, text: str) -> list[int]:
        """A user's text → ids; names of control words in it are ordinary letters."""
        return self.encode_parts([plain_text(text)])

    def drawing_ids(self, parts: Sequence[str | Sequence[int]]) -> list[int]:
        """Texts and pictures (their codes, not bracketed) in order → ids of a prompt for `generate_codes`.

        Raises:
            CodesError: a picture without codes, or one outside the codebook.
        """
        ids: list[int] = []
        for part in parts:
            words = self.vocabulary
            ids += self.text_ids(part) if isinstance(part, str) else words.code_to_id(
                words.check_codes([int(code) for code in part]))
        return ids


# ---------------------------------------------------------------------------------------------- pictures that are read


def picture_inputs(embed: Embed, words: LavitWords, features: Sequence[Tensor], pad_id: int = 2
                   ) -> tuple[Tensor, Tensor]:
    """Pictures' features [n, D] → start, features, end of each, padded on the left: [B, L, D] and mask [B, L]."""
    device = features[0].device
    start, end, pad = embed(torch.tensor([[words.boi_id, words.eoi_id, pad_id]], device=device))[0].split(1)
    rows = [torch.cat([start, row.to(start), end]) for row in features]
    return embeds_padded_left(rows, pad[0])


def with_text(picture: tuple[Tensor, Tensor], text: tuple[Tensor, Tensor], side: Side) -> tuple[Tensor, Tensor]:
    """Pictures [B, P, D] and texts [B, T, D] with their masks, both padded on the left → one row each.

    `side`: "caption" leaves a text's padding between picture and text, "answer" moves it in front of both.
    """
    embeds, mask = (torch.cat(pair, dim=1) for pair in zip(picture, text, strict=True))
    width, places = picture[1].shape[1], torch.arange(mask.shape[1], device=mask.device)
    padding = (text[1] == 0).sum(dim=1, keepdim=True)
    if side == "caption":
        padding = padding * (padding == text[1].shape[1])  # behind padding alone, the model would go on from padding
    order = torch.where(places < padding, places + width,  # the text's padding, the picture, the text
                        torch.where(places < padding + width, places - padding, places))
    return embeds.gather(1, order[..., None].expand_as(embeds)), mask.gather(1, order)


def understand_inputs(llm: Any, tokenizer: LavitTokenizer, features: Sequence[Tensor],
                      prompts: str | Sequence[str] | None = None, side: Side = "answer") -> tuple[Tensor, Tensor]:
    """What the language model reads.

    Args:
        llm: a `LlamaForCausalLM`.
        features: of each picture [n, D] in the language model's width.
        prompts: a text for each picture, or one for all; None: pictures alone.

    Returns:
        Embeddings [B, L, D], mask [B, L].

    Raises:
        RequestError: no picture, or another number of texts than pictures.
    """
    embed = llm.get_input_embeddings()
    device = embed.weight.device
    if not features:
        raise RequestError("There is no picture to read.")
    picture = picture_inputs(embed, tokenizer.vocabulary, [row.to(device) for row in features], tokenizer.pad_id)
    if prompts is None:
        return picture
    texts = [prompts] * len(features) if isinstance(prompts, str) else several(prompts, "The prompts")
    if len(texts) != len(features):
        raise RequestError(f"There are {len(features)} pictures, but {len(texts)} texts; give one text, or one each.")
    ids, mask = padded_left([tokenizer.text_ids(text) for text in texts], tokenizer.pad_id)
    return with_text(picture, (embed(ids.to(device)), mask.to(device)), side)


def several(given: Any, what: str) -> list[Any]:
    """`given` as a list; raises RequestError for one text, or what is no list."""
    if isinstance(given, (str, bytes)) or not hasattr(given, "__len__"):
        raise RequestError(f"{what} must be a list, not {type(given).__name__}.")
    return list(given)


def question_prompts(questions: str | Sequence[str], template: str | None = QUESTION) -> list[str]:
    """Questions in the template's "{}"; without a template as they are.

    Raises:
        RequestError: a template with other braces, or without any.
    """
    asked = [plain_text(one, "The question") for one in (
        [questions] if isinstance(questions, str) else several(questions, "The questions"))]
    if not template:
        return asked
    try:
        if template.format("") == template.format("?"):
            raise ValueError("the question would be left out")
        return [template.format(question) for question in asked]
    except (IndexError, KeyError, ValueError, AttributeError) as error:
        raise RequestError(f"A prompt has one place for the question, {{}}: {template!r} cannot be filled.") from error


@dataclass(frozen=True)
class QuestionProcessor:
    """Questions of the benchmarks: lower case, without . ! " ( ) * # : ; ~, the first `max_words` words."""

    max_words: int = setting(50, least=1)

    def __post_init__(self) -> None:
        check_settings(self, "question")

    def __call__(self, question: str) -> str:
        return question_text(question, self.max_words)


# ---------------------------------------------------------------------------------------------- texts that are written


def caption_of(text: str) -> str:
    """A caption: what stands before the first "." (so "Dr. Smith" is cut to "Dr", as released)."""
    return text.strip().partition(".")[0]


def answer_of(text: str) -> str:
    """An answer, not yet lemmatised: what stands before a line's end, "question:", "Long answer:", "," and "."."""
    answer = text.strip()
    for end in ANSWER_ENDS:
        answer = answer.partition(end)[0]
    return answer
