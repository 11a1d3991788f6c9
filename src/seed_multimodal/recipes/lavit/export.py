"""Export of a checkpoint of LaVIT's stage 1 to folders `tokenizer` and `decoder`."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from seed_multimodal.device import seeded
from seed_multimodal.disk import JsonObject, atomic_folder, output_folder, read_json_object
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.fingerprints import fingerprint, same_fingerprint
from seed_multimodal.models.lavit.decoder import CodeDecoder, LavitDecoderConfig
from seed_multimodal.models.lavit.modeling import DynamicTokenizer, LavitTokenizerConfig
from seed_multimodal.models.seed.checkpoints import load_vision
from seed_multimodal.recipes.lavit.losses import LavitStage1
from seed_multimodal.settings import read_settings
from seed_multimodal.state_dicts import assign_strictly, load_state_dict

MODEL_TYPE = "lavit_stage1"
VISION = "tokenizer.encoder."  # beginning of the vision encoder's names


@dataclass(frozen=True)
class Stage1Sizes:
    """Sizes of both networks; `config.json` of a run.

    tower: `fingerprint` of the run's vision encoder, which its checkpoints leave out.
    """

    tokenizer: LavitTokenizerConfig
    decoder: LavitDecoderConfig
    tower: str | tuple[float, ...] = ""  # numbers: of an earlier version

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"model_type": MODEL_TYPE, **asdict(self)}

    @classmethod
    def read(cls, file: Path) -> Stage1Sizes:
        """Inverse of `to_dict`. Raises ConfigError: missing, damaged, or of another model."""
        values = read_json_object(file, ConfigError)
        if values.pop("model_type", None) != MODEL_TYPE:
            raise ConfigError(f"{file}: this is not the configuration of a run of LaVIT's stage 1.")
        return read_settings(cls, values, str(file))


def export_stage1(
    checkpoint: str | Path,
    out: str | Path,
    *,
    vision: str | Path | None = None,
    config: str | Path | None = None,
    force: bool = False,
) -> tuple[Path, Path]:
    """Write `out/tokenizer` (without projector) and `out/decoder` (with random U-Net heads).

    vision: the vision encoder of the run, unless the checkpoint holds it or its sizes name it.
    config: a file with the sizes; None: the `config.json` next to the checkpoint.

    Raises:
        CheckpointError: not such a checkpoint, no vision encoder, or not that of the training.
    """
    # 1. The run's networks. A fixed seed: two exports have the same U-Net heads.
    file = Path(checkpoint)
    state = load_state_dict(file)
    target = output_folder(out, force=force, label="the tokenizer", inputs=[checkpoint, vision])
    sizes = Stage1Sizes.read(Path(config) if config else file.with_name("config.json"))
    with seeded(0):
        model = LavitStage1(DynamicTokenizer(sizes.tokenizer), CodeDecoder(sizes.decoder))

    # 2. Their weights. Checkpoints leave the frozen vision encoder out.
    encoder = model.tokenizer.encoder
    if vision is None and not any(name.startswith(VISION) for name in state):
        vision = encoder.config.default_weights
    if vision is not None:
        load_vision(encoder, vision, None)
        if sizes.tower and not same_fingerprint(sizes.tower, fingerprint(encoder)):
            raise CheckpointError(
                f"{vision}: not the vision encoder that {file} was trained with; give the file of "
                "the run's model.vit_weights."
            )
        for name, value in encoder.state_dict().items():
            state[VISION + name] = value
    assign_strictly(model, state, file, allow_missing=("tokenizer.vit_proj.*", "decoder.unet_*"))

    # 3. One folder with both, complete or not at all.
    tokenizer, decoder = model.trained_networks()
    with atomic_folder(target, out, ConfigError) as folder:
        tokenizer.save_pretrained(folder / "tokenizer")
        decoder.save_pretrained(folder / "decoder")
    return target / "tokenizer", target / "decoder"


def export_command(checkpoint: str, args: Namespace) -> tuple[JsonObject, str]:
    """`seed export-tokenizer --lavit`."""
    tokenizer, decoder = export_stage1(
        checkpoint, args.out, vision=args.vision, config=args.config, force=args.force
    )
    record = {"tokenizer": str(tokenizer), "decoder": str(decoder)}
    return record, f"{tokenizer}\n{decoder}"
