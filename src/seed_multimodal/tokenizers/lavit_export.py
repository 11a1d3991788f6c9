"""A checkpoint of LaVIT's stage 1 becomes folders that the library loads: `tokenizer` and `decoder`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from seed_multimodal.disk import making_folder, output_folder, read_json_object
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.finite import refuse_diverged
from seed_multimodal.likeness import same_weights, some_weights
from seed_multimodal.settings import read_settings
from seed_multimodal.tokenizers.initial import load_tower
from seed_multimodal.tokenizers.lavit import DynamicTokenizer, LavitTokenizerConfig
from seed_multimodal.tokenizers.lavit_decoder import CodeDecoder, LavitDecoderConfig
from seed_multimodal.tokenizers.lavit_files import save_dynamic_tokenizer
from seed_multimodal.tokenizers.lavit_training import LavitStage1
from seed_multimodal.weights import assign_strictly, load_state_dict

MODEL_TYPE, TOWER = "lavit_stage1", "tokenizer.encoder."


@dataclass(frozen=True)
class Stage1Sizes:
    """What stage 1 trains; `config.json` of its run.

    Attributes:
        tower: `some_weights` of the vision tower that it was trained with, which its checkpoints leave out; none: not
            known.
    """

    tokenizer: LavitTokenizerConfig
    decoder: LavitDecoderConfig
    tower: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"model_type": MODEL_TYPE, "tokenizer": self.tokenizer.to_dict(), "decoder": asdict(self.decoder),
                "tower": self.tower}

    @classmethod
    def read(cls, file: Path) -> Stage1Sizes:
        """Inverse of `to_dict`.

        Raises:
            ConfigError: the file is missing, damaged, or of another model.
        """
        values = read_json_object(file, ConfigError)
        if values.get("model_type") != MODEL_TYPE:
            raise ConfigError(f"{file}: this is not the configuration of a run of LaVIT's stage 1.")
        tower = values.get("tower", [])
        if not isinstance(tower, list) or not all(isinstance(one, int | float) for one in tower):
            raise ConfigError(f"{file}: tower must be a list of numbers.")
        return cls(LavitTokenizerConfig.from_dict(values.get("tokenizer", {}), file),
                   read_settings(LavitDecoderConfig, values.get("decoder", {}), f"{file}: decoder"),
                   tuple(tower))


def export_stage1(checkpoint: str | Path, out: str | Path, *, vision: str | Path | None = None,
                  config: str | Path | None = None, force: bool = False) -> tuple[Path, Path]:
    """Write `out/tokenizer` (for `load_dynamic_tokenizer`) and `out/decoder` (for `CodeDecoder.from_pretrained`).

    Stage 1 trains neither the projector to a language model, which is left out, nor the decoder's heads for a U-Net,
    which hold random numbers for their own training to start from.

    Args:
        vision: the tower that the run was given, unless the checkpoint holds it.
        config: sizes; by default `config.json` beside the checkpoint.
        force: replace a folder that is not empty.

    Raises:
        CheckpointError: not such a checkpoint, one from before codes were used or of a diverged training, no tower, or
            another one than in the training. ConfigError: no sizes, or `out` is not empty.
    """
    file = Path(checkpoint)
    if not file.is_file():
        raise CheckpointError(f"{file}: there is no such checkpoint; give the file that stage 1 wrote "
                              "(OUTPUT_DIR/checkpoint_N.pth).")
    target = output_folder(out, force=force, what="the tokenizer", read=[checkpoint, vision])
    sizes = Stage1Sizes.read(Path(config) if config else file.with_name("config.json"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # two exports give the same heads
        model = LavitStage1(DynamicTokenizer(sizes.tokenizer), CodeDecoder(sizes.decoder))
    state = load_state_dict(file)
    frozen = [name for name, part in model.named_parameters() if not part.requires_grad and "quantize" not in name]
    tower = [name for name in frozen if name.startswith(TOWER)]
    if vision is None and not set(tower) <= state.keys():
        raise CheckpointError(f"{file}: holds no vision tower; give the file that the run had as model.vit_weights "
                              "(--vision FILE).")
    assign_strictly(model, state, file, allow_missing=frozen)
    if vision is not None:
        load_tower(model.tokenizer.encoder, vision, None)
    _refuse_useless(model, sizes, file, vision)
    tokenizer, decoder = model.finished()
    with making_folder(target, out, ConfigError) as folder:
        save_dynamic_tokenizer(tokenizer, folder / "tokenizer")
        decoder.save_pretrained(folder / "decoder")
    return target / "tokenizer", target / "decoder"


def _refuse_useless(model: LavitStage1, sizes: Stage1Sizes, file: Path, vision: str | Path | None) -> None:
    """Refuse what would load and give codes that mean nothing."""
    if vision is not None and sizes.tower and not same_weights(sizes.tower, some_weights(model.tokenizer.encoder)):
        raise CheckpointError(f"{vision}: not the vision tower that {file} was trained with; give the file that the "
                              "run had as model.vit_weights.")
    if bool((model.quantize.ema_count == 1).all()):  # as it is made; no training leaves all averages equal
        raise CheckpointError(f"{file}: was saved before codes were used (model.codebook_warmup), so its codebook is "
                              "random; export a later checkpoint.")
    given = {} if vision is None else {name: str(vision) for name in model.state_dict() if name.startswith(TOWER)}
    refuse_diverged(model, given, file)
