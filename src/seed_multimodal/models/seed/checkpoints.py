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

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from seed_multimodal.disk import read_json_object
from seed_multimodal.errors import CheckpointError, first_line
from seed_multimodal.hub import fetch, find_file, find_folder, first_file, is_hub_name
from seed_multimodal.models.seed.configuration import Seed1Config, Seed2Config, TokenizerConfig
from seed_multimodal.nn.eva import EvaConfig, EvaVit, clip_from_eva, eva_from_clip
from seed_multimodal.nn.layers import resize_square
from seed_multimodal.nn.pretrained import CONFIG, WEIGHTS, read_encoder_link
from seed_multimodal.progress import quiet_loading
from seed_multimodal.settings import read_settings
from seed_multimodal.weights import LoadReport, assign_strictly, load_state_dict

if TYPE_CHECKING:
    from transformers import PreTrainedModel

State = dict[str, Tensor]
Log = Callable[[str], None] | None

VISION = "visual_encoder."
ENCODER_PARTS = ("visual_encoder", "ln_vision", "Qformer", "query_tokens")
VISION_FILES = ("eva_vit_g.safetensors", "eva_vit_g.pth")
VISION_URL = (
    "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/eva_vit_g.pth"
)
BLIP2_FILES = ("blip2_pretrained.safetensors", "blip2_pretrained.pth")
BLIP2_ADVICE = (
    "download https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/"
    f"{BLIP2_FILES[-1]} and give its path, for example pretrained/{BLIP2_FILES[-1]}"
)
CLIP_FOLDER = "CLIP-ViT-H-14-laion2B-s32B-b79K"
CLIP_ADVICE = (
    f"download laion/{CLIP_FOLDER} from the Hugging Face hub and put it at pretrained/{CLIP_FOLDER}"
)

QUERY_LAYERS = "Qformer.bert.encoder.layer"
UNUSED_IN_VISION = ("norm.*", "fc_norm.*", "head.*", "mask_token", "rel_pos_bias.*", "lm_head.*")
# Tensors that a tokenizer's files may hold and that are ignored.
OPTIONAL_TENSORS = (
    # Stage 1: projections, heads and target encoders.
    "text_proj.*",
    "vision_proj.*",
    "itm_head.*",
    "temp",
    "text_encoder.*",
    "clip_model.*",
    "embedding_head.*",
    # A moving-average codebook.
    "quantize.ema_*",
    # The Q-Former's text path.
    "Qformer.cls.*",
    "Qformer.bert.embeddings.word_embeddings.*",
    "Qformer.bert.embeddings.position_embeddings.*",
    f"{QUERY_LAYERS}.*.intermediate.*",
    f"{QUERY_LAYERS}.*.output.*",
    # The decoder of the other tokenizer.
    "distill_image_proj.*",
    "image_down.*",
    "blocks_image.*",
    "pos_embed_image",
    "Reverse_Qformer.*",
    "reverse_tokens",
    "Reverse_Qformer_text.*",
    "reverse_tokens_text",
    "distill_text_proj.*",
    "blocks_text.*",
    "pos_embed_text",
    # Stage 2's reconstruction of the Q-Former's output.
    "pos_embed",
    "blocks.*",
    # The end of the vision encoder.
    *(VISION + name for name in UNUSED_IN_VISION),
)


@dataclass(frozen=True)
class Layout:
    """The original files of a tokenizer; later files override earlier ones."""

    name: str
    config_class: type[TokenizerConfig]
    files: tuple[str, ...]
    decoder: str  # name of a tensor that only this tokenizer has
    sources: str  # where the files can be downloaded
    wrapped: bool = False  # the files, but for the vision encoder's, hold `{"model": tensors}`

    def find(self, folder: Path) -> list[Path]:
        """Those of the files that are in a folder, as safetensors or as in the original."""
        files: list[Path] = []
        for name in self.files:
            as_safetensors = str(Path(name).with_suffix(".safetensors"))
            file = first_file(folder, (as_safetensors, name))
            if file is not None:
                files.append(file)
        return files

    def advice(self, folder: str | Path) -> str:
        """Download instructions for `folder`, without a full stop."""
        return f"put {self.sources} and {VISION_FILES[-1]} (from {VISION_URL}) into {folder}"


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
    if layout.decoder not in state:
        raise CheckpointError(
            f"{files[-1]}: not a {layout.name} tokenizer: it holds no {layout.decoder!r} "
            f"(its first tensor is {next(iter(state))!r})."
        )

    # 2. The vision encoder, in a file of its own unless the tokenizer's file holds it.
    has_vision = any(name.startswith(VISION) for name in state)
    if vision is not None or not has_vision:
        vision_file = _vision_file(files[-1].parent, vision)
        files = [*files, vision_file]
        state |= {VISION + name: value for name, value in read_vision(vision_file).items()}

    # 3. Sizes.
    if config is None:
        config = saved_config(layout.config_class, files[0].parent)
    if config is None:
        config = layout.config_class.of_original(state)
    return config, state, " and ".join(map(str, files))


def find_files(source: str | Path, layout: Layout) -> list[Path]:
    """Weight files of a source, without the vision encoder's.

    Raises:
        CheckpointError: a file is missing.
    """
    # 1. The folder, of a hub id the local cache's.
    path = Path(source).expanduser()
    if not os.path.exists(path):  # Path.exists raises for a name that is too long
        if not is_hub_name(source):
            raise CheckpointError(
                f"{path}: no such {layout.name} tokenizer; {layout.advice(path)}."
            )
        stems = [str(Path(name).with_suffix(".*")) for name in (*layout.files, VISION_FILES[0])]
        path = fetch(str(source), (CONFIG, WEIGHTS, *stems), layout.advice(path))
    folder = path if path.is_dir() else path.parent
    originals = layout.find(folder)
    is_complete = len(originals) == len(layout.files)

    # 2. A file: with the earlier original ones if it is the last of them.
    if path.is_file():
        return [*originals[:-1], path] if path in originals else [path]

    # 3. A folder: ours, even next to original files if its config.json is a tokenizer's.
    if (folder / WEIGHTS).is_file():
        if saved_config(layout.config_class, folder) or not is_complete:
            return [folder / WEIGHTS]
    if not is_complete:
        raise CheckpointError(
            f"{folder}: holds no {layout.name} tokenizer ({' and '.join(layout.files)}); "
            f"{layout.advice(folder)}."
        )
    return originals


def saved_config(config_class: type[TokenizerConfig], folder: Path) -> TokenizerConfig | None:
    """Sizes in a folder's `config.json`; None without it, or if it is another model's."""
    file = folder / CONFIG
    if not file.is_file():
        return None
    values = dict(read_json_object(file))
    if values.pop("model_type", None) != config_class.model_type:
        return None
    return read_settings(config_class, values, str(file))


# ---- the vision encoder


def _vision_file(folder: Path, vision: str | Path | None) -> Path:
    # The original programs download the file to torch's cache.
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    if vision is not None:
        file: Path | None = Path(vision)
    else:
        file = first_file(folder, VISION_FILES) or first_file(cache, VISION_FILES)
    if file is None or not os.path.isfile(file):
        raise CheckpointError(
            f"{file or folder / VISION_FILES[-1]}: no such vision-encoder file; download it "
            f"from {VISION_URL}."
        )
    return file


def read_vision(source: str | Path, config: EvaConfig | None = None) -> State:
    """A vision encoder's tensors by EVA's names.

    source: `eva_vit_g.pth` (a file, its folder or a hub id), a checkpoint that holds the tensors as
        `visual_encoder.*`, or (ours) a transformers CLIP folder.
    config: sizes for a CLIP folder, whose first `depth` layers are used; None: all layers.

    Raises:
        CheckpointError: missing (with download instructions), damaged, or of another model.
    """
    # 1. A CLIP folder.
    config_file = Path(source) / CONFIG
    if config_file.is_file():
        model_type = str(read_json_object(config_file).get("model_type"))
        if model_type.startswith("clip"):
            clip = load_clip_vision(source, log=None)
            if config is None:
                config = EvaConfig(depth=clip.config.num_hidden_layers, pre_norm=True)
            return eva_from_clip(clip.state_dict(), config)

    # 2. A file of EVA, or a checkpoint around it.
    file = find_file(source, VISION_FILES, f"download {VISION_URL} and give its path")
    state = load_state_dict(file, mapped=True)
    vision = {
        name.removeprefix(VISION): value for name, value in state.items() if name.startswith(VISION)
    }
    if not vision:
        vision = state
    if "patch_embed.proj.weight" not in vision:
        raise CheckpointError(
            f"{file}: not an EVA vision encoder: it holds no 'patch_embed.proj.weight' "
            f"(its first tensor is {next(iter(state))!r})."
        )
    return vision


def load_vision(vit: EvaVit, source: str | Path, log: Log = print) -> LoadReport:
    """Fill a vision encoder from any source of `read_vision`.

    Position embeddings are resized and unused blocks left out.
    """
    report = fill_vision(vit, read_vision(source, vit.config), source)
    if log is not None:
        log(report.describe())
    return report


def fill_vision(vit: EvaVit, state: Mapping[str, Tensor], source: str | Path) -> LoadReport:
    """Load EVA's tensors into a vision encoder.

    Raises:
        CheckpointError: a tensor is missing or has another size.
    """
    return assign_strictly(
        vit,
        fit_positions(state, vit.config),
        source,
        foreign=True,
        allow_unexpected=[*UNUSED_IN_VISION, f"blocks.{vit.config.depth}.*"],
    )


def fit_positions(state: Mapping[str, Tensor], config: EvaConfig, prefix: str = "") -> State:
    """The tensors with the position embeddings resized to the image size of `config`."""
    name = f"{prefix}pos_embed"
    embeddings = state.get(name)  # [1, 1 + patches, W], the class token first
    if embeddings is None or embeddings.ndim != 3 or embeddings.shape[1] == config.tokens:
        return dict(state)
    patches = resize_square(embeddings[0, 1:], config.grid)
    return {**state, name: torch.cat([embeddings[:, :1], patches[None]], dim=1)}


# ---- the CLIP model of the target, BLIP-2


def load_clip_vision(
    source: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    log: Log = print,
) -> PreTrainedModel:
    """A CLIP's frozen vision encoder in eval mode; its `.image_embeds` are stage 2's target.

    source: a transformers folder or hub id, of a complete CLIP or its vision half.

    Raises:
        CheckpointError: missing (with instructions), damaged, or weights of another size than in
            config.json.
    """
    from transformers import CLIPVisionModelWithProjection

    return _load_clip(CLIPVisionModelWithProjection, source, device, dtype, log)


def load_clip_text(
    source: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    log: Log = print,
) -> PreTrainedModel:
    """The frozen text encoder of a CLIP folder or hub id; see `load_clip_vision`."""
    from transformers import CLIPTextModelWithProjection

    return _load_clip(CLIPTextModelWithProjection, source, device, dtype, log)


def _load_clip(
    model_class: type[PreTrainedModel],
    source: str | Path,
    device: str | torch.device,
    dtype: torch.dtype,
    log: Log,
) -> PreTrainedModel:
    folder = find_folder(source, (CONFIG, "*.safetensors", "*.bin", "*.index.json"), CLIP_ADVICE)
    values = read_json_object(folder / CONFIG, advice=CLIP_ADVICE)

    # 1. The tensors, if the folder has a link to another model's file for the vision encoder.
    state: State | None = None
    link = read_encoder_link(folder)
    if link is not None:
        encoder_file, prefix = link
        state = clip_from_eva(load_state_dict(encoder_file), prefix)
        state |= load_state_dict(folder / WEIGHTS)

    # 2. transformers' model, with these tensors or from the folder.
    try:
        config = model_class.config_class.from_pretrained(folder)
        # A complete CLIP states its width outside of vision_config, where a default would be read.
        config.projection_dim = values.get("projection_dim", config.projection_dim)
        with quiet_loading("transformers"):
            model, info = model_class.from_pretrained(
                folder if state is None else None,
                config=config,
                state_dict=state,
                dtype=dtype,
                local_files_only=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder}: not a complete CLIP ({first_line(error)}); {CLIP_ADVICE}."
        ) from error

    # 3. transformers fills missing tensors with random values, which is an error here.
    missing = sorted(name for name in info["missing_keys"] if not name.endswith("position_ids"))
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} tensors are missing, first {missing[0]!r}; {CLIP_ADVICE}."
        )
    if log is not None:
        log(f"{folder}: {model_class.__name__} loaded.")
    frozen: PreTrainedModel = model.to(device).requires_grad_(False).eval()
    return frozen


def load_blip2(model: nn.Module, source: str | Path, log: Log = print) -> LoadReport:
    """Initialize a `Stage1Model` from `blip2_pretrained.pth`, except for the vision encoder.

    The file has the Q-Former with its text path, `ln_vision`, the projections and the temperature.

    source: the file, its folder or a hub id.

    Raises:
        CheckpointError: missing (with download instructions), damaged, of another model or size.
    """
    file = find_file(source, BLIP2_FILES, BLIP2_ADVICE)
    state = load_state_dict(file)
    if "query_tokens" not in state:
        raise CheckpointError(
            f"{file}: not a BLIP-2 stage-1 checkpoint: it holds no 'query_tokens' (its first "
            f"tensor is {next(iter(state))!r}); {BLIP2_ADVICE}."
        )
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
        allow_missing=(f"{VISION}*", "embedding_head.*", "*position_ids", "Qformer.cls.*"),
    )
    if log is not None:
        log(report.describe())
    return report
