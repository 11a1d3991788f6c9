"""What the stages of nano-lavit share: folders, words, the tower that it has in common with nano, and that tower's
features of the pool, which are computed once."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.language.lavit import LavitTokenizer
from seed_multimodal.tokenizers.lavit import DynamicTokenizer, LavitTokenizerConfig
from seed_multimodal.tokenizers.lavit_decoder import LavitDecoderConfig
from seed_multimodal.tokenizers.seed2 import Seed2Config
from seed_multimodal.weights import load_state_dict
from seed_nano.train.pixels import scene_pixels, to_clip
from seed_nano.train.vae import scene_latents
from seed_nano.train.workspace import Workspace, read_part
from seed_nano.train_lavit.config import NanoLavitConfig
from seed_nano.world.records import sentences
from seed_nano.world.scene import Scene
from seed_nano.world.source import NanoContent

PREFIX = "visual_encoder."  # of the tower in nano's tokenizer
SPOKEN = 400  # questions and edits from which the word pieces are learned, beside all sentences of nano's world


class LavitSpace(Workspace):
    """One run of nano-lavit: `config`, `work` and `out` as of nano's."""

    config: NanoLavitConfig  # type: ignore[assignment]

    @property
    def tokenizer_folder(self) -> Path:
        """The folder of selector, merger and codebook."""
        return self.out / "tokenizer"

    @property
    def words_folder(self) -> Path:
        """The folder of the words."""
        return self.out / "words"

    @property
    def decoder_folder(self) -> Path:
        """The diffusion folder."""
        return self.out / "pixels"

    @property
    def nano_tokenizer(self) -> Path:
        """The tokenizer of the finished nano.

        Raises:
            CheckpointError: there is none.
        """
        folder = Path(self.config.start) / "seed_tokenizer"
        if not (folder / "model.safetensors").is_file() or not (folder / "diffusion_model" / "vae").is_dir():
            raise CheckpointError(f"{self.config.start}: start must be the folder of a finished nano, whose vision "
                                  "tower and autoencoder nano-lavit shares: bash scripts/nano_speedrun.sh trains one.")
        return folder

    @property
    def autoencoder(self) -> Path:
        """nano's autoencoder."""
        return self.nano_tokenizer / "diffusion_model" / "vae"

    @cached_property
    def sizes(self) -> LavitTokenizerConfig:
        """Of the dynamic tokenizer.

        Raises:
            ConfigError: pictures of another size than nano's tower takes.
        """
        made, vit = self.config.tokenizer, Seed2Config.read(self.nano_tokenizer / "config.json").vit
        if vit.image_size != self.config.image_size:
            raise ConfigError(f"image_size is {self.config.image_size}, but the tower of {self.config.start} takes "
                              f"pictures of {vit.image_size}.")
        return LavitTokenizerConfig(
            vit, vit_head=0, merger_depth=made.merger_depth, merger_heads=made.heads,
            merger_mlp_width=made.merger_mlp, codebook_size=made.codes, codebook_dim=made.code_dim,
            llm_width=self.config.llm.width)

    @property
    def decoder_sizes(self) -> LavitDecoderConfig:
        """Of the decoder of codes."""
        made, unet, width = self.config.tokenizer, self.config.unet, self.sizes.vit.width
        return LavitDecoderConfig(
            tokens=self.sizes.patches, code_dim=made.code_dim, width=width, depth=made.decoder_depth, heads=made.heads,
            mlp_width=made.decoder_mlp, feature_dim=width, prompt_dim=unet.prompt, pooled_dim=unet.pooled)

    def new_tokenizer(self) -> DynamicTokenizer:
        """An untrained tokenizer with nano's tower, on the device."""
        torch.manual_seed(self.config.seed + 1)
        tokenizer = DynamicTokenizer(self.sizes)
        tokenizer.encoder.load_state_dict({name.removeprefix(PREFIX): value.float() for name, value in
                                           load_state_dict(self.nano_tokenizer / "model.safetensors").items()
                                           if name.startswith(PREFIX)})
        return tokenizer.to(self.device)

    @cached_property
    def features(self) -> Tensor:
        """The tower's features of the pool, float16 `[P, N, D]`."""
        return self.cached("features", "start", lambda: self.see(self.pool), start=self.config.start)

    @torch.no_grad()
    def see(self, scenes: list[Scene]) -> Tensor:
        """The tower's features of scenes, float16 `[S, N, D]`."""
        tokenizer, size = self.new_tokenizer().eval(), self.config.image_size
        return torch.cat([tokenizer.patch_features(to_clip(scene_pixels(scenes[at:at + 512], size), self.device))
                          .half().cpu() for at in range(0, len(scenes), 512)])

    @cached_property
    def latents(self) -> Tensor:
        """nano's latents of the first `drawn` scenes of the pool, float16 `[d, C, h, w]`."""
        from diffusers import AutoencoderKL

        scenes, size = self.pool[: self.config.drawn], self.config.image_size
        return self.cached("latents", "start", lambda: scene_latents(
            read_part(AutoencoderKL, self.autoencoder), scenes, size, self.device), drawn=self.config.drawn)

    @cached_property
    def words(self) -> LavitTokenizer:  # type: ignore[override]
        """The text tokenizer, trained on the world's sentences if it does not exist.

        Raises:
            ConfigError: the one that exists was trained with other settings.
        """
        folder = self.words_folder
        if not (folder / "tokenizer.model").is_file():
            LavitTokenizer.train([*sentences(), *_spoken()], folder, self.config.llm.text_vocabulary,
                                 self.config.tokenizer.codes, self.sizes.patches)
        words = LavitTokenizer.from_pretrained(folder)
        self.check_words(words, folder / "tokenizer.model", f"{self.work / 'language'}")
        return words


def _spoken() -> list[str]:
    """What is asked, answered and wished for."""
    found = []
    for content, fields in (("qa", ("question", "answer")), ("edits", ("instruction",))):
        records = NanoContent(None, content, number=SPOKEN)
        found += [str(records.locate(row).fields[field]) for row in range(SPOKEN) for field in fields]
    return found
