"""What the stages of nano-x share: folders, words, pictures of edits, and what was computed of them and is kept."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from seed_multimodal.errors import CheckpointError
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_nano.train.workspace import Workspace
from seed_nano.train_x.config import KINDS, NanoXConfig
from seed_nano.world.records import from_last_picture, record_at, sentences
from seed_nano.world.scene import Scene
from seed_nano.world.x_records import x_record_at

SPOKEN = 60  # records of each kind whose texts the word pieces are learned from, beside all sentences of nano's world


class XWorkspace(Workspace):
    """One run of nano-x: `config`, `work` and `out` as of nano's."""

    config: NanoXConfig  # type: ignore[assignment]

    @property
    def tokenizer_folder(self) -> Path:
        """The folder of the words."""
        return self.out / "tokenizer"

    @property
    def decoder_folder(self) -> Path:
        """SDXL's diffusers folder."""
        return self.out / "sdxl"

    @property
    def start(self) -> Path:
        """The finished nano.

        Raises:
            CheckpointError: there is none.
        """
        folder = Path(self.config.start)
        decoder = folder / "seed_tokenizer" / "diffusion_model"
        if not all((decoder / part / "config.json").is_file() for part in ("vae", "image_encoder")):
            raise CheckpointError(f"{folder}: start must be the folder of a finished nano, whose autoencoder and "
                                  "vision tower nano-x takes over: bash scripts/nano_speedrun.sh trains one.")
        return decoder

    @cached_property
    def edits(self) -> list[tuple[Scene, Scene]]:
        """The pool: pictures before and after an edit."""
        found = []
        for number in range(self.config.pool):
            asked, answered = (message["content"] for message in
                               from_last_picture(record_at("edits", self.config.seed, number)))
            found.append((asked[0], answered[1]))
        return found

    @cached_property
    def pool(self) -> list[Scene]:
        """Both pictures of every edit."""
        return [scene for pair in self.edits for scene in pair]

    @cached_property
    def words(self) -> MultimodalTokenizer:
        """The tokenizer, trained on the world's sentences if it does not exist.

        Raises:
            ConfigError: the one that exists was trained with other settings.
        """
        folder, sizes = self.tokenizer_folder, self.config.llm
        if not (folder / "tokenizer.model").is_file():
            spoken = [part for kind in KINDS for number in range(SPOKEN)
                      for message in x_record_at(kind, 0, number)["messages"] for part in message["content"]
                      if isinstance(part, str) and "<" not in part]
            tokens = self.config.tower.grid**2
            MultimodalTokenizer.train([*sentences(), *spoken], folder, vocab_size=sizes.text_vocabulary, n_codes=tokens,
                                      tokens_per_image=tokens, n_locations=sizes.locations)
        words = MultimodalTokenizer.from_pretrained(folder)
        self.check_words(words, folder / "tokenizer.model", f"{self.work / 'sft'}")
        return words

    @property
    def counted_words(self) -> dict[str, int]:
        """As of `Workspace`; a picture's words are only its places."""
        sizes = self.config.llm
        return {"llm.text_vocabulary": sizes.text_vocabulary, "tower.grid squared": self.config.tower.grid**2,
                "llm.locations": sizes.locations}
