"""A checkpoint of LaVIT's stage 1 becomes folders that the library loads: `tokenizer` and `decoder`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from seed_multimodal.disk import making_folder, output_folder, read_json_object
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.settings import read_settings
from seed_multimodal.tokenizers.initial import load_tower
from seed_multimodal.tokenizers.lavit import DynamicTokenizer, LavitTokenizerConfig
from seed_multimodal.tokenizers.lavit_decoder import CodeDecoder, LavitDecoderConfig
from seed_multimodal.tokenizers.lavit_files import save_dynamic_tokenizer
from seed_multimodal.tokenizers.lavit_training import LavitStage1
from seed_multimodal.weights import assign_strictly, load_state_dict

MODEL_TYPE = "lavit_stage1"


@dataclass(frozen=True)
class Stage1Sizes:
    """What stage 1 trains; `config.json` of its run."""

    tokenizer: LavitTokenizerConfig
    decoder: LavitDecoderConfig

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"model_type": MODEL_TYPE, "tokenizer": self.tokenizer.to_dict(), "decoder": asdict(self.decoder)}

    @classmethod
    def read(cls, file: Path) -> Stage1Sizes:
        """Inverse of `to_dict`.

        Raises:
            ConfigError: the file is missing, damaged, or of another model.
        """
        values = read_json_object(file, ConfigError)
        if values.get("model_type") != MODEL_TYPE:
            raise ConfigError(f"{file}: this is not the configuration of a run of LaVIT's stage 1.")
        return cls(LavitTokenizerConfig.from_dict(values.get("tokenizer", {}), file),
                   read_settings(LavitDecoderConfig, values.get("decoder", {}), f"{file}: decoder"))


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
        CheckpointError: not such a checkpoint, or no tower. ConfigError: no sizes, or `out` is not empty.
    """
    file = Path(checkpoint)
    target = output_folder(out, force=force, what="the tokenizer", read=[checkpoint, vision])
    sizes = Stage1Sizes.read(Path(config) if config else file.with_name("config.json"))
    model = LavitStage1(DynamicTokenizer(sizes.tokenizer), CodeDecoder(sizes.decoder))
    state = load_state_dict(file)
    frozen = [name for name, part in model.named_parameters() if not part.requires_grad and "quantize" not in name]
    tower = [name for name in frozen if name.startswith("tokenizer.encoder.")]
    if vision is None and not set(tower) <= state.keys():
        raise CheckpointError(f"{file}: holds no vision tower; give the file that the run had as model.vit_weights "
                              "(--vision FILE).")
    assign_strictly(model, state, file, allow_missing=frozen)
    if vision is not None:
        load_tower(model.tokenizer.encoder, vision, None)
    tokenizer, decoder = model.finished()
    with making_folder(target, out, ConfigError) as folder:
        save_dynamic_tokenizer(tokenizer, folder / "tokenizer")
        decoder.save_pretrained(folder / "decoder")
    return target / "tokenizer", target / "decoder"
