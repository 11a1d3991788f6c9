"""LaVIT's dynamic tokenizer on disk: the original layout, and our own folder.

    original  visual_tokenizer/eva_vitg_psz14.bin     vision encoder
              visual_tokenizer/tokenizer_encoder.bin  token selector, token merger, codebook and the layers before it
              language_model/visual_weight.bin        for understanding: another token merger, and the projector
    ours      config.json, model.safetensors          everything, `encoder.*` included
              visual_weight.safetensors               for understanding; without it model.safetensors serves for both
              tower.json                              {"file": …, "prefix": …}: `encoder.*` is in that file of another
                                                      system, under names with this prefix

Each `.bin` may be a `.safetensors`. Sizes: `config.json` (original: in `visual_tokenizer/`), else the original ones.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seed_multimodal.disk import replace_text
from seed_multimodal.errors import CheckpointError
from seed_multimodal.hub import LAVIT_WHERE, first_file
from seed_multimodal.lavit.modeling import DynamicTokenizer, LavitTokenizerConfig, TokenMerger
from seed_multimodal.nn.layers import cast_layers
from seed_multimodal.nn.pretrained import fill_buffers, name_encoder, named_encoder
from seed_multimodal.weights import assign_strictly, load_state_dict, save_state_dict

State = dict[str, Tensor]
ENCODER, READER = "encoder.", ("causal_encoder.", "vit_proj.")
TRAINING_STATE = ("quantize.*", "decoder.*")  # beside the codebook's rows


@dataclass(frozen=True)
class LavitFiles:
    """Files of a tokenizer; `encoder_prefix` of the vision encoder's names in `encoder` is replaced by `encoder.`."""

    config: Path | None
    codec: Path
    encoder: Path | None
    encoder_prefix: str
    reader: Path | None

    def state(self, understanding: bool) -> State:
        state = {} if self.encoder is None else {
            ENCODER + name.removeprefix(self.encoder_prefix): value
            for name, value in load_state_dict(self.encoder, mapped=True).items()
            if name.startswith(self.encoder_prefix)}
        state |= load_state_dict(self.codec, mapped=True)
        if understanding and self.reader is not None:
            state = {name: value for name, value in state.items() if not name.startswith(READER)}
            state |= load_state_dict(self.reader, mapped=True)
        return state


def load_dynamic_tokenizer(folder: str | Path, understanding: bool = False, *, device: str | torch.device = "cpu",
                           dtype: torch.dtype = torch.float32, language_model: str = "language_model",
                           config: LavitTokenizerConfig | None = None) -> DynamicTokenizer:
    """The tokenizer in eval mode, frozen.

    Args:
        folder: an original model folder or our own tokenizer folder.
        understanding: with the token merger and projector of the language model's input, not those that make codes.
        dtype: of linear and convolution layers; all else stays as stored (fp32 in the original).
        language_model: sub-folder of an original folder that holds `visual_weight`.
        config: sizes where no config.json gives them; None: the original ones.

    Raises:
        CheckpointError: a file that is missing, unsafe or damaged, or tensors that are missing or of another size.
        ConfigError: a damaged config.json.
    """
    place = Path(folder).expanduser()
    files = find_files(place, language_model if understanding else None)
    if files.config is not None:
        config = DynamicTokenizer.read_config(files.config)
    state = files.state(understanding)
    with torch.device("meta"):
        model = DynamicTokenizer(config or LavitTokenizerConfig())
    if not understanding and "vit_proj.weight" not in state:
        model.vit_proj = None
    assign_strictly(cast_layers(model, dtype), state, place, allow_unexpected=TRAINING_STATE, foreign=True,
                    device=device)
    return fill_buffers(model, device).requires_grad_(False).eval()


def load_both(folder: str | Path, **options: Any) -> tuple[DynamicTokenizer, DynamicTokenizer]:
    """(for codes, for understanding): they share all but token merger and projector; one model where the folder has
    one merger. `options` as of `load_dynamic_tokenizer`."""
    coding = load_dynamic_tokenizer(folder, **options)
    reader = find_files(Path(folder).expanduser(), options.get("language_model", "language_model")).reader
    return coding, coding if reader is None else with_merger(coding, load_state_dict(reader, mapped=True), reader)


def with_merger(model: DynamicTokenizer, state: Mapping[str, Tensor], source: str | Path) -> DynamicTokenizer:
    """A tokenizer that shares all of `model` but token merger and projector, which are those in `state`."""
    with torch.device("meta"):
        parts = nn.ModuleDict({"causal_encoder": TokenMerger(model.config),
                               "vit_proj": nn.Linear(model.config.vit.width, model.config.llm_width)})
    cast_layers(parts, model.encode_task_layer[0].weight.dtype)
    assign_strictly(parts, state, source, foreign=True, device=model.device)
    other = copy.copy(model)
    other._modules = {**model._modules, **parts.requires_grad_(False).eval()._modules}
    return other


def save_dynamic_tokenizer(model: DynamicTokenizer, folder: str | Path, understanding: DynamicTokenizer | None = None,
                           tower: tuple[str | Path, str] | None = None) -> Path:
    """Write our own folder, without training state. Token merger and projector of `understanding` go into a file of
    their own; a vision encoder in `tower` (file, prefix of its names) is referred to, not stored again."""
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    left_out = ("quantize.ema_", *((ENCODER,) if tower else ()))
    if tower:
        name_encoder(place, *tower)
    save_state_dict({name: value for name, value in model.state_dict().items() if not name.startswith(left_out)},
                    place / "model.safetensors")
    if understanding is not None:
        save_state_dict(reading_state(understanding), place / "visual_weight.safetensors")
    sizes = {"model_type": model.model_type, **asdict(model.config)}
    replace_text(place / "config.json", json.dumps(sizes, indent=2) + "\n")
    return place


def reading_state(model: DynamicTokenizer) -> State:
    """Tensors of `visual_weight`: the token merger and the projector."""
    return {name: value for name, value in model.state_dict().items() if name.startswith(READER)}


def find_files(folder: Path, language_model: str | None) -> LavitFiles:
    """`language_model`: sub-folder of the required `visual_weight` in the original layout; None: not required."""
    def original(place: Path, name: str) -> Path:
        file = first_file(place, (f"{name}.safetensors", f"{name}.bin"))
        if file is None:
            raise CheckpointError(f"{place / name}.bin: there is no such file (or .safetensors) of a LaVIT tokenizer; "
                                  f"{LAVIT_WHERE}.")
        return file

    if (folder / "model.safetensors").is_file():
        file, prefix = named_encoder(folder) or (None, "")
        reader = first_file(folder, ("visual_weight.safetensors", "visual_weight.bin"))
        return LavitFiles(folder / "config.json", folder / "model.safetensors", file, prefix, reader)
    place = folder / "visual_tokenizer"
    reader = None if language_model is None else original(folder / language_model, "visual_weight")
    codec, encoder = original(place, "tokenizer_encoder"), original(place, "eva_vitg_psz14")
    return LavitFiles(first_file(place, ("config.json",)), codec, encoder, "", reader)
