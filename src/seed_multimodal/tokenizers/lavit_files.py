"""LaVIT's dynamic tokenizer on disk: the released layout, and our own folder.

    released  visual_tokenizer/eva_vitg_psz14.bin     the vision tower
              visual_tokenizer/tokenizer_encoder.bin  selector, merger, codebook and what leads to it
              language_model/visual_weight.bin        for understanding: another merger, and the projector
    ours      config.json, model.safetensors          all of it, `encoder.*` included
              visual_weight.safetensors               for understanding; without it model.safetensors serves for both
              tower.json                              {"file": …, "prefix": "visual_encoder."}: `encoder.*` is in that
                                                      file of another system, under these names

Each `.bin` may be a `.safetensors` instead; a `.bin` is read as tensors only. Sizes come from `config.json` (in
`visual_tokenizer/` of a released folder), else from the shapes. The released programs take whatever names match and run
with random numbers for the rest; here each file must hold the parts it is there for. Source: specification §2.7.
"""

from __future__ import annotations

import copy
import fnmatch
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from seed_multimodal.disk import read_json_object, replace_text
from seed_multimodal.errors import CheckpointError
from seed_multimodal.hub import first_file
from seed_multimodal.nn.eva import EvaConfig
from seed_multimodal.nn.layers import cast_layers
from seed_multimodal.nn.pretrained import name_encoder, named_encoder
from seed_multimodal.tokenizers.checkpoints import with_buffers
from seed_multimodal.tokenizers.lavit import MODEL_TYPE, DynamicTokenizer, LavitTokenizerConfig
from seed_multimodal.tokenizers.lavit_merger import Merger
from seed_multimodal.weights import assign_strictly, load_state_dict, refuse_tensors, save_state_dict

State = dict[str, Tensor]
TOWER = "encoder."
OURS = "model.safetensors"
CODING = ("token_predictor.*", "causal_encoder.*", "quantize.embedding.*", "encode_task_layer.*")
READING = ("causal_encoder.*", "vit_proj.*")  # what stage 2 trains with the language model
LEFT_OUT = ("quantize.*", "decoder.*")  # states of training beside the codebook's rows
RELEASED_WIDTH, RELEASED_HEADS = 1408, 16  # weights do not show the number of heads
WHERE = "download rain1011/LaVIT-7B-v2 from the hub and give the folder"


@dataclass(frozen=True)
class _Part:
    """One file: `needed` names must be in it; of its names those count that begin with `within`, which `prefix`
    replaces."""

    file: Path
    needed: tuple[str, ...]
    prefix: str = ""
    within: str = ""

    def read(self) -> State:
        return {self.prefix + name.removeprefix(self.within): value
                for name, value in load_state_dict(self.file, mapped=True).items() if name.startswith(self.within)}


def load_dynamic_tokenizer(folder: str | Path, understanding: bool = False, *, device: str | torch.device = "cpu",
                           dtype: torch.dtype = torch.float32, language_model: str = "language_model",
                           config: LavitTokenizerConfig | None = None) -> DynamicTokenizer:
    """The tokenizer in eval mode, frozen; `load_reports` tells which names came from which file.

    Args:
        folder: a released model folder or our own tokenizer folder.
        understanding: with the merger and projector that feed the language model, not those that make codes.
        dtype: of linear and convolution layers; all else stays as in the files, fp32 as released.
        language_model: the sub-folder of a released folder that holds `visual_weight`.
        config: sizes, where no config.json gives them and the width is not the released one.

    Raises:
        CheckpointError: a file that is missing, unsafe or damaged, or lacks a part it is there for.
        ConfigError: a damaged config.json.
    """
    parts, sizes = _find(Path(folder).expanduser(), understanding, language_model)
    states = [part.read() for part in parts]
    if config is None:
        whole = {name: value for state in states for name, value in state.items()}
        config = LavitTokenizerConfig.read(sizes) if sizes else infer_config(whole, parts[0].file)
    with torch.device("meta"):
        model = DynamicTokenizer(config)
    if not understanding and not any("vit_proj.weight" in state for state in states):
        model.vit_proj = None
    _fill(cast_layers(model, dtype), parts, states, device)
    return with_buffers(model, device)


def load_both(folder: str | Path, **options: object) -> tuple[DynamicTokenizer, DynamicTokenizer]:
    """(for codes, for understanding): one tower, selector and codebook, two mergers. `options` as of
    `load_dynamic_tokenizer`."""
    coding = load_dynamic_tokenizer(folder, False, **options)  # type: ignore[arg-type]
    name = str(options.get("language_model", "language_model"))
    last = _find(Path(folder).expanduser(), True, name)[0][-1]
    if last.needed != READING:  # our own folder with one merger
        return coding, coding
    return coding, with_merger(coding, last.read(), last.file)


def count_stored(folder: str | Path, understanding: bool = True,
                 language_model: str = "language_model") -> tuple[int, int, int]:
    """Numbers of weights in a tokenizer's files, wherever they lie: tower, all else, second merger and projector (0
    where there are none, or without `understanding`); arguments and errors as of `load_dynamic_tokenizer`."""
    parts, second = _find(Path(folder).expanduser(), understanding, language_model)[0], 0
    if parts[-1].needed == READING:
        second = sum(value.numel() for value in parts.pop().read().values())
    numbers = {name: value.numel() for part in parts for name, value in part.read().items()}
    tower = sum(number for name, number in numbers.items() if name.startswith(TOWER))
    return tower, sum(numbers.values()) - tower, second


def with_merger(model: DynamicTokenizer, state: Mapping[str, Tensor], source: str | Path) -> DynamicTokenizer:
    """A tokenizer that shares all of `model` but its merger and projector, which are those in `state`.

    Raises:
        CheckpointError: `state` lacks one of their tensors, or has another size.
    """
    own = [name for name in model.state_dict() if name.startswith("causal_encoder.")]
    lacking = [name for name in (*own, "vit_proj.weight", "vit_proj.bias") if name not in state]
    refuse_tensors(lacking, (), source, "missing from the file")
    other, sizes = copy.copy(model), model.config
    other._modules = dict(model._modules)
    with torch.device("meta"):
        other.causal_encoder = Merger(sizes.vit.width, sizes.merger_depth, sizes.merger_heads, sizes.merger_mlp_width,
                                      grad_checkpoint=sizes.grad_checkpoint)
        other.vit_proj = nn.Linear(sizes.vit.width, len(state.get("vit_proj.bias", ())))
    other.load_reports = list(model.load_reports)
    for name, part in (("causal_encoder.", other.causal_encoder), ("vit_proj.", other.vit_proj)):
        cast_layers(part, model.encode_task_layer[0].weight.dtype)
        mine = {key.removeprefix(name): value for key, value in state.items() if key.startswith(name)}
        other.load_reports.append(assign_strictly(part, mine, source, device=model.device))
        part.requires_grad_(False).eval()
    return other


def save_dynamic_tokenizer(model: DynamicTokenizer, folder: str | Path, understanding: DynamicTokenizer | None = None,
                           tower: tuple[str | Path, str] | None = None) -> Path:
    """Write our own folder; states of training are left out.

    Args:
        understanding: its merger and projector, in a file of their own.
        tower: a file that holds the vision tower under names with a prefix: it is named instead of stored again.
    """
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    left_out = ("quantize.ema_", *((TOWER,) if tower else ()))
    state = {name: value for name, value in model.state_dict().items() if not name.startswith(left_out)}
    if tower:
        name_encoder(place, *tower)
    save_state_dict(state, place / OURS)
    if understanding is not None:
        save_state_dict(reading_state(understanding), place / "visual_weight.safetensors")
    replace_text(place / "config.json", json.dumps(model.config.to_dict(), indent=2) + "\n")
    return place


def reading_state(model: DynamicTokenizer) -> State:
    """Tensors of `visual_weight`: the merger and the projector."""
    return {name: value for name, value in model.state_dict().items() if _matches(name, READING)}


def infer_config(state: Mapping[str, Tensor], source: str | Path) -> LavitTokenizerConfig:
    """Sizes from the shapes of a whole checkpoint, `encoder.*` included.

    Raises:
        CheckpointError: a tensor that shows a size is missing, or the width is not the released one.
    """
    def shape(name: str) -> Sequence[int]:
        if name not in state:
            raise CheckpointError(f"{source}: not a complete LaVIT tokenizer: there is no {name!r}.")
        return state[name].shape

    def layers(prefix: str) -> int:
        found = (re.match(rf"{prefix}\.(\d+)\.", name) for name in state)
        return 1 + max((int(match[1]) for match in found if match), default=-1)

    width, _, patch, _ = shape("encoder.patch_embed.proj.weight")
    if width != RELEASED_WIDTH:
        raise CheckpointError(f"{source}: weights do not show the number of attention heads, and the width {width} is "
                              f"not the released one ({RELEASED_WIDTH}): put a config.json beside the file.")
    grid = round((shape("encoder.pos_embed")[1] - 1) ** 0.5)
    vit = EvaConfig(image_size=grid * patch, patch_size=patch, width=width, depth=layers("encoder.blocks"),
                    heads=RELEASED_HEADS, mlp_width=shape("encoder.blocks.0.mlp.fc1.weight")[0])
    rows, dim = shape("quantize.embedding.weight")
    reader = state.get("vit_proj.weight")
    return LavitTokenizerConfig(
        vit=vit, vit_head=shape("encoder.head.weight")[0] if "encoder.head.weight" in state else 0,
        merger_depth=layers("causal_encoder.blocks"), merger_heads=RELEASED_HEADS,
        merger_mlp_width=shape("causal_encoder.blocks.0.mlp.fc1.weight")[0], codebook_size=rows, codebook_dim=dim,
        llm_width=LavitTokenizerConfig.llm_width if reader is None else len(reader))


# ---- which files, which tensors


def _find(folder: Path, understanding: bool, language_model: str) -> tuple[list[_Part], Path | None]:
    """Files in the order in which later ones lie over earlier ones, and config.json."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such LaVIT folder; {WHERE}.")
    own = folder / "config.json"
    if (folder / OURS).is_file() and own.is_file() and read_json_object(own).get("model_type") == MODEL_TYPE:
        reader, tower = first_file(folder, _either("visual_weight")), named_encoder(folder)
        needed: tuple[str, ...] = (TOWER + "*", *CODING) if tower is None else CODING
        if understanding and reader is None:
            needed = (*needed, "vit_proj.*")
        found = [_Part(folder / OURS, needed)]
        if tower is not None:
            found.insert(0, _Part(tower[0], (TOWER + "*",), TOWER, tower[1]))
        return [*found, _Part(reader, READING)] if understanding and reader is not None else found, own
    place = folder / "visual_tokenizer"
    if (folder / OURS).is_file() and not place.is_dir():
        why = f"its model_type is not {MODEL_TYPE}" if own.is_file() else "there is no such file, which tells the sizes"
        raise CheckpointError(f"{own}: {why}, so {OURS} beside it is not read as a LaVIT tokenizer.")
    wanted = [(place, "eva_vitg_psz14", (TOWER + "*",), TOWER), (place, "tokenizer_encoder", CODING, "")]
    if understanding:
        wanted.append((folder / language_model, "visual_weight", READING, ""))
    parts = []
    for where, name, needed, prefix in wanted:
        file = first_file(where, _either(name))
        if file is None:
            raise CheckpointError(f"{where / name}.bin: there is no such file (or .safetensors) of a LaVIT tokenizer; "
                                  f"{WHERE}.")
        parts.append(_Part(file, needed, prefix))
    sizes = place / "config.json"
    return parts, sizes if sizes.is_file() else None


def _either(name: str) -> tuple[str, str]:
    return f"{name}.safetensors", f"{name}.bin"


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _fill(model: DynamicTokenizer, parts: Sequence[_Part], states: Sequence[State], device: str | torch.device) -> None:
    """Put the files over each other into the model, each checked for what it is there for."""
    names = list(model.state_dict())
    for part, state in zip(parts, states, strict=True):
        lacking = [name for name in names if _matches(name, part.needed) and name not in state]
        refuse_tensors(lacking, (), part.file, "missing from the file")
    later: set[str] = set()
    reports = []
    for part, state in reversed(list(zip(parts, states, strict=True))):
        mine = {name: value for name, value in state.items() if name not in later}
        later |= mine.keys() & set(names)
        reports.append(assign_strictly(model, mine, part.file, allow_missing=("*",), allow_unexpected=LEFT_OUT,
                                       foreign=True, device=device))
    model.load_reports = reports[::-1]
    refuse_tensors([name for name in names if name not in later], (), parts[-1].file, "in none of the files")
