"""Loading of SEED tokenizers and of the initial weights of their training.

    our folder        config.json + model.safetensors
    original SEED-2   seed_quantizer.pt + eva_vit_g.pth
    original SEED-1   causal_qformer.pth + seed_tokenizer.pth (overrides the first) + eva_vit_g.pth
    a file            the last file of one of these, next to the others
    a hub id          `owner/name` of one of these

Each file may be a `.safetensors` instead. Known training-only tensors are ignored and reported,
unknown ones ignored with a warning; a missing tensor or one of another shape is an error. Files are
memory-mapped: weights on the CPU in the file's precision stay views of the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from seed_multimodal.config import read_table
from seed_multimodal.errors import CheckpointError
from seed_multimodal.models.seed.configuration import Seed1Config, Seed2Config, TokenizerConfig
from seed_multimodal.nn.pretrained import CONFIG, WEIGHTS, saved_config
from seed_multimodal.nn.vision.base import State, VisionEncoder
from seed_multimodal.nn.vision.clip import Log
from seed_multimodal.nn.vision.eva import FILES, PREFIX
from seed_multimodal.state_dicts import LoadReport, assign_strictly, load_state_dict, require_tensor
from seed_multimodal.weights.catalogue import catalogue, download_advice
from seed_multimodal.weights.find import find_file, find_folder, first_file

VISION = PREFIX
ENCODER_PARTS = ("visual_encoder", "ln_vision", "Qformer", "query_tokens")
VISION_FILES = FILES
BLIP2_FILES = ("blip2_pretrained.safetensors", "blip2_pretrained.pth")
BLIP2_ADVICE = (
    "download https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/"
    f"{BLIP2_FILES[-1]} and give its path, for example pretrained/{BLIP2_FILES[-1]}"
)

# Patterns of tensors that a tokenizer's files may hold and that are ignored.
OPTIONAL_TENSORS: list[str] = read_table(__file__)


@dataclass(frozen=True)
class Layout:
    """The original files of a tokenizer; later files override earlier ones."""

    name: str
    config_class: type[TokenizerConfig]
    files: tuple[str, ...]
    decoder: str  # name of a tensor that only this tokenizer has
    sources: str  # where the files can be downloaded
    wrapped: bool = False  # the files, but for the vision encoder's, hold `{"model": tensors}`

    def saved_config(self, folder: Path) -> TokenizerConfig | None:
        """Sizes in a folder's `config.json`, if it is this tokenizer's."""
        return saved_config(self.config_class, self.config_class.model_type, folder)

    def find(self, folder: Path) -> list[Path]:
        """Those of the files that are in a folder, as safetensors or as in the original."""
        names = [(str(Path(name).with_suffix(".safetensors")), name) for name in self.files]
        files = [first_file(folder, alternatives) for alternatives in names]
        return [file for file in files if file is not None]

    def advice(self, folder: str | Path) -> str:
        """Download instructions for `folder`, without a full stop."""
        return f"put {self.sources} and {VISION_FILES[-1]} (of seed fetch tokenizer) into {folder}"


SEED2 = Layout(
    "SEED-2",
    Seed2Config,
    ("seed_quantizer.pt",),
    "distill_image_proj.weight",
    "seed_quantizer.pt (from AILab-CVC/seed-tokenizer-2 on the Hugging Face hub)",
)
SEED1 = Layout(
    "SEED-1",
    Seed1Config,
    ("causal_qformer.pth", "seed_tokenizer.pth"),
    "distill_text_proj.weight",
    "causal_qformer.pth and seed_tokenizer.pth (linked from SEED-1.md of "
    "github.com/AILab-CVC/SEED)",
    wrapped=True,
)


# ---- tokenizers


def read_tokenizer(
    layout: Layout, source: str | Path, vision: str | Path | None, config: TokenizerConfig | None
) -> tuple[TokenizerConfig, State, str]:
    """Sizes of a tokenizer, its tensors, and the names of their files.

    Arguments and errors are those of the tokenizer's `from_pretrained`.
    """
    # 1. Q-Former, codebook and decoder.
    files = find_files(source, layout)
    state: State = {}
    for file in files:
        state |= load_state_dict(file, mapped=True)
    require_tensor(state, layout.decoder, files[-1], f"a {layout.name} tokenizer")

    # 2. Sizes.
    config = config or layout.saved_config(files[0].parent)
    config = config or layout.config_class.of_original(state)

    # 3. The vision encoder, in a file of its own unless the tokenizer's file holds it.
    has_vision = any(name.startswith(VISION) for name in state)
    if vision is not None or not has_vision:
        vision_file = _vision_file(files[-1].parent, vision)
        files = [*files, vision_file]
        vision_state = config.vit.read_weights(str(vision_file))
        state |= {VISION + name: value for name, value in vision_state.items()}
    return config, state, " and ".join(map(str, files))


def find_files(source: str | Path, layout: Layout) -> list[Path]:
    """Weight files of a source, without the vision encoder's.

    Raises:
        CheckpointError: a file is missing.
    """
    # 1. The folder or file, also of a hub id.
    stems = [str(Path(name).with_suffix(".*")) for name in (*layout.files, VISION_FILES[0])]
    advice = layout.advice(Path(source))
    path = find_folder(source, (CONFIG, WEIGHTS, *stems), advice)
    folder = path if path.is_dir() else path.parent
    originals = layout.find(folder)
    is_complete = len(originals) == len(layout.files)

    # 2. A file: with the earlier original ones if it is the last of them.
    if path.is_file():
        return [*originals[:-1], path] if path in originals else [path]

    # 3. A folder: ours, even next to original files if its config.json is a tokenizer's.
    if (folder / WEIGHTS).is_file():
        if layout.saved_config(folder) or not is_complete:
            return [folder / WEIGHTS]
    if not is_complete:
        raise CheckpointError(
            f"{folder}: holds no {layout.name} tokenizer ({' and '.join(layout.files)}); "
            f"{layout.advice(folder)}."
        )
    return originals


# ---- the vision encoder


def _vision_file(folder: Path, vision: str | Path | None) -> Path:
    """The given file, one in the folder or in torch's cache, where the original programs put it, or
    the original's."""
    folders = (folder, Path(torch.hub.get_dir()) / "checkpoints")
    files = (first_file(path, VISION_FILES) for path in folders)
    file = vision or next(filter(None, files), None)
    original = Path(catalogue().parts["tokenizer"].folder) / VISION_FILES[-1]
    return find_file(file or original, VISION_FILES, download_advice("tokenizer"))


def load_vision(encoder: VisionEncoder, source: str | Path, log: Log) -> LoadReport:
    """Fill a vision encoder from any source of its `read_weights`.

    Raises:
        CheckpointError: a tensor is missing or has another size.
    """
    config = encoder.config
    report = assign_strictly(
        encoder,
        config.fit_weights(config.read_weights(str(source))),
        source,
        foreign=True,
        allow_unexpected=config.unused,
    )
    if log is not None:
        log(report.describe())
    return report


# ---- BLIP-2


def load_blip2(model: nn.Module, source: str | Path, log: Log) -> LoadReport:
    """Initialize a `Stage1Model` from `blip2_pretrained.pth`, except for the vision encoder.

    The file has the Q-Former with its text path, `ln_vision`, the projections and the temperature.

    source: the file, its folder or a hub id.

    Raises:
        CheckpointError: missing (with download instructions), damaged, of another model or size.
    """
    file = find_file(source, BLIP2_FILES, BLIP2_ADVICE)
    state = load_state_dict(file)
    require_tensor(state, "query_tokens", file, f"{BLIP2_FILES[-1]} of BLIP-2's stage 1")
    # The image-text matching head is not used; BERT's prediction head only if the model has it.
    unused = ["itm_head.*"]
    if not hasattr(model.Qformer, "cls"):
        unused.append("Qformer.cls.*")
    report = assign_strictly(
        model,
        {name: value for name, value in state.items() if not name.startswith(VISION)},
        file,
        foreign=True,
        allow_unexpected=unused,
        allow_missing=(
            f"{VISION}*",
            "clip_model.*",
            "embedding_head.*",
            "*position_ids",
            "Qformer.cls.*",
        ),
    )
    if log is not None:
        log(report.describe())
    return report
