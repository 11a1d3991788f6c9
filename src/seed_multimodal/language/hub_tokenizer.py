"""`HubTokenizer`: a fast tokenizer of transformers, with image tokens behind its own tokens.

    tokenizer = HubTokenizer.create("Qwen/Qwen3-0.6B", n_codes=8192, tokens_per_image=32)
    tokenizer.save_pretrained(folder)

Its folder has the hub's files (`tokenizer.json`, …) and `image_tokens.json` (the number of codes,
the tokens of an image, SEED-X's number of locations, and the tokens that end an answer). White
space next to images stays.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from seed_multimodal.disk import read_json_object, replace_json
from seed_multimodal.errors import CheckpointError, ConfigError, first_line
from seed_multimodal.language.text_tokenizer import HUB_TOKENIZER, TextTokenizer
from seed_multimodal.language.tokenizer import MODEL, MultimodalTokenizer
from seed_multimodal.language.vocabulary import ImageVocabulary, SeedXVocabulary
from seed_multimodal.progress import LOADING
from seed_multimodal.weights.find import find_path

IMAGE_TOKENS = "image_tokens.json"
CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
GENERATION = "generation_config.json"
# Files of a hub tokenizer that belong to it.
FILES = (HUB_TOKENIZER, CONFIG, CHAT_TEMPLATE, "special_tokens_map.json", GENERATION)
# Arguments of chat templates (Qwen 3, SmolLM 3, Granite): no thoughts before an answer.
WITHOUT_THOUGHTS = {"enable_thinking": False, "thinking": False}


class HubTokenizer(TextTokenizer):
    """A fast tokenizer of transformers with image tokens.

    end_ids: tokens that end an answer, the one of training data first.
    n_locations: of boxes; 0: without SEED-X's tokens.
    """

    strips_at_images = False

    def __init__(
        self,
        folder: Path,
        n_codes: int,
        tokens_per_image: int,
        end_ids: Sequence[int] = (),
        n_locations: int = 0,
    ) -> None:
        """Raises CheckpointError: the files cannot be read, or name no end of an answer."""
        # 1. Two tokenizers: of prompts, whose names of special tokens are these tokens, and of
        #    texts, in which they are text.
        self._folder = folder
        from seed_multimodal.nn.pretrained import reading_files  # with torch

        with LOADING, reading_files(folder, "tokenizer", "download its files again"):
            from transformers import PreTrainedTokenizerFast

            self._hub = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        self._plain = copy.deepcopy(self._hub.backend_tokenizer)
        self._plain.encode_special_tokens = True
        self._sizes = (n_codes, tokens_per_image)
        self._n_locations = n_locations
        n_text = max(self._hub.get_vocab().values()) + 1
        vocabulary = self._image_vocabulary(n_text)
        added = vocabulary.added_tokens if self.names_image_tokens else {}
        special = {
            token.content: id
            for id, token in self._hub.added_tokens_decoder.items()
            if token.special
        }
        super().__init__(vocabulary, n_text, added, special)

        # 2. Special tokens; a start only if the tokenizer itself puts it before a text.
        self.has_chat_template = bool(self._hub.chat_template)
        self.eos_token_ids = tuple(end_ids) or self._find_end_ids()
        self.bos_token_id = self._hub.bos_token_id
        first_ids = self._hub.backend_tokenizer.encode("").ids[:1]
        self.start_ids = tuple(id for id in first_ids if id == self.bos_token_id)
        pad = self._hub.pad_token_id
        self.pad_token_id = self.eos_token_id if pad is None else pad

    def _image_vocabulary(self, n_text: int) -> ImageVocabulary:
        """Image tokens behind the text tokens; families with other ones override it."""
        if self._n_locations:
            return SeedXVocabulary.behind(n_text, *self._sizes, self._n_locations)
        return ImageVocabulary(n_text, *self._sizes)

    def _find_end_ids(self) -> tuple[int, ...]:
        """The end of a turn in the chat template, the tokenizer's, and those of its model."""
        ids: list[int] = []
        if self.has_chat_template:
            user = {"role": "user", "content": "a"}
            turns = [user, {"role": "assistant", "content": "\u241f"}, user]
            *_, after = self.render_chat(turns).split("\u241f")
            texts, names = self.split(after)
            if names and not texts[0].strip():
                ids.append(self._control_ids[names[0]])
        if self._hub.eos_token_id is not None:
            ids.append(self._hub.eos_token_id)
        if (self._folder / GENERATION).is_file():
            recorded = read_json_object(self._folder / GENERATION).get("eos_token_id") or []
            ids += recorded if isinstance(recorded, list) else [recorded]
        if not ids:
            raise CheckpointError(
                f"{self._folder / CONFIG}: has no eos_token, so that no answer would end."
            )
        return tuple(dict.fromkeys(ids))

    # ---- files

    @classmethod
    def create(
        cls, source: str | Path, n_codes: int, tokens_per_image: int, n_locations: int = 0
    ) -> Self:
        """The tokenizer of a hub model's folder, or hub id, with new image tokens.

        n_locations: for SEED-X, whose tokens include those of boxes and of parts of images.
        """
        folder = find_path(source)
        if folder is None or not (folder / HUB_TOKENIZER).is_file():
            raise CheckpointError(f"{source}: has no {HUB_TOKENIZER}, the file of a hub tokenizer.")
        return cls(folder, n_codes, tokens_per_image, n_locations=n_locations)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Load a folder. Raises CheckpointError: a missing or damaged file."""
        file = Path(folder) / IMAGE_TOKENS
        if not file.is_file():
            raise CheckpointError(
                f"{folder}: has {HUB_TOKENIZER}, but no {IMAGE_TOKENS} (n_codes, "
                "tokens_per_image): HubTokenizer.create adds the image tokens."
            )
        values = read_json_object(file)
        try:
            sizes = (int(values["n_codes"]), int(values["tokens_per_image"]))
            end_ids = [int(id) for id in values.get("eos_token_ids", [])]
            n_locations = int(values.get("n_locations", 0))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{file}: is damaged ({error!r}).") from error
        return cls(Path(folder), *sizes, end_ids, n_locations)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the hub's files and `image_tokens.json`."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            source = self._folder / name
            if source.is_file() and source.resolve() != (target / name).resolve():
                shutil.copyfile(source, target / name)
        values = {
            "n_codes": self.vocabulary.n_codes,
            "tokens_per_image": self.vocabulary.tokens_per_image,
            "eos_token_ids": list(self.eos_token_ids),
            "n_locations": self._n_locations,
        }
        replace_json(target / IMAGE_TOKENS, values)
        return target

    # ---- text ⇄ ids

    def render_chat(self, messages: Sequence[Mapping[str, object]]) -> str:
        """Without thoughts before the answer; see `TextTokenizer`."""
        if not self.has_chat_template:
            raise ConfigError(f"{self._folder}: this tokenizer has no chat template.")
        try:
            text: str = self._hub.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=messages[-1]["role"] == "user",
                **WITHOUT_THOUGHTS,
            )
        except Exception as error:  # noqa: BLE001 (jinja's errors, or raised by the template)
            raise ConfigError(
                f"{self._folder}: the chat template fails ({first_line(error)})."
            ) from error
        return text

    def _encode_text(self, text: str) -> list[int]:
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        return ids

    def _decode_text(self, ids: list[int]) -> str:
        text: str = self._hub.decode(ids, clean_up_tokenization_spaces=False)
        return text

    def token_id(self, token: str) -> int:
        if token in self._control_ids:
            return self._control_ids[token]
        return self._hub.convert_tokens_to_ids(token) or 0

    def _text_token(self, id: int) -> str:
        return str(self._hub.convert_ids_to_tokens(id))

    def __getstate__(self) -> dict[str, Any]:
        """For workers of data: the arguments, from which the tokenizer is built again."""
        arguments = (self._folder, *self._sizes, self.eos_token_ids, self._n_locations)
        return {"arguments": arguments}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(*state["arguments"])  # type: ignore[misc]


def load_text_tokenizer(folder: str | Path) -> TextTokenizer:
    """The tokenizer of a folder: a hub tokenizer, or the original's SentencePiece model."""
    path = Path(folder)
    is_hub = (path / HUB_TOKENIZER).is_file() and not (path / MODEL).is_file()
    if is_hub or (path / IMAGE_TOKENS).is_file():
        return HubTokenizer.from_pretrained(path)
    return MultimodalTokenizer.from_pretrained(path)


def has_chat_template(folder: Path) -> bool:
    """Whether a hub tokenizer's folder has a chat template."""
    if (folder / CHAT_TEMPLATE).is_file():
        return (folder / HUB_TOKENIZER).is_file()
    config = folder / CONFIG
    return config.is_file() and bool(read_json_object(config).get("chat_template"))
