"""Loading of SEED tokenizers and of the initial weights of their training.

    our folder        config.json + model.safetensors
    original SEED-2   seed_quantizer.pt + eva_vit_g.pth
    original SEED-1   causal_qformer.pth + seed_tokenizer.pth (laid over the first) + eva_vit_g.pth
    a file            the last file of one of these, next to the others; `vision=`: file of the vision encoder
    a hub id          `owner/name` of one of these

Each file may be a `.safetensors` instead. Known training-only tensors are ignored and reported, unknown ones ignored
with a warning; a missing tensor or one of another shape is an error. Files are memory-mapped: weights on the CPU in the
file's precision stay views of the file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seed_multimodal.disk import read_json_object
from seed_multimodal.errors import CheckpointError, first_line
from seed_multimodal.hub import fetch, find_file, find_folder, first_file, is_hub_name
from seed_multimodal.nn.eva import EvaConfig, EvaVit, clip_from_eva, eva_from_clip
from seed_multimodal.nn.layers import resize_square
from seed_multimodal.nn.pretrained import CONFIG, WEIGHTS, read_encoder_link
from seed_multimodal.progress import quiet_loading
from seed_multimodal.weights import LoadReport, assign_strictly, load_state_dict

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

# Optional tensors: stage 1's text path and heads, target encoders, a moving-average codebook, the other tokenizer's
# decoder, stage 2's reconstruction blocks, the end of the vision encoder.
QUERY_LAYERS = "Qformer.bert.encoder.layer"
UNUSED_IN_VISION = ("norm.*", "fc_norm.*", "head.*", "mask_token", "rel_pos_bias.*", "lm_head.*")
KNOWN = (
    "text_proj.*",
    "vision_proj.*",
    "itm_head.*",
    "temp",
    "text_encoder.*",
    "clip_model.*",
    "embedding_head.*",
    "quantize.ema_*",
    "Qformer.cls.*",
    "Qformer.bert.embeddings.word_embeddings.*",
    "Qformer.bert.embeddings.position_embeddings.*",
    f"{QUERY_LAYERS}.*.intermediate.*",
    f"{QUERY_LAYERS}.*.output.*",
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
    "pos_embed",
    "blocks.*",
    *(VISION + name for name in UNUSED_IN_VISION),
)


@dataclass(frozen=True)
class Layout:
    """The original files of a tokenizer; later files override earlier ones. `decoder`: a tensor that only it has;
    `where`: sources of the files; `wrapped`: files contain `{"model": tensors}` (never the vision encoder's)."""

    name: str
    files: tuple[str, ...]
    decoder: str
    where: str
    wrapped: bool = False

    def find(self, folder: Path) -> list[Path]:
        """Those of the files that are in a folder, as safetensors or as in the original."""
        found = (
            first_file(folder, (str(Path(name).with_suffix(".safetensors")), name))
            for name in self.files
        )
        return [file for file in found if file is not None]

    def advice(self, folder: str | Path) -> str:
        """Download instructions for `folder`, without a full stop."""
        return f"put {self.where} and {VISION_FILES[-1]} (from {VISION_URL}) into {folder}"


SEED2 = Layout(
    "SEED-2",
    ("seed_quantizer.pt",),
    "distill_image_proj.weight",
    "seed_quantizer.pt (from AILab-CVC/seed-tokenizer-2 on the Hugging Face hub)",
)
SEED1 = Layout(
    "SEED-1",
    ("causal_qformer.pth", "seed_tokenizer.pth"),
    "distill_text_proj.weight",
    "causal_qformer.pth and seed_tokenizer.pth (linked from SEED-1.md of github.com/AILab-CVC/SEED)",
    True,
)


# ---- tokenizers


def read_tokenizer(
    kind: Any, source: str | Path, vision: str | Path | None, config: Any
) -> tuple[Any, State, str]:
    """Sizes and tensors of a tokenizer by their original names, and the files that they are from.

    Args:
        kind: `Seed1Tokenizer` or `Seed2Tokenizer`; the other arguments and errors are those of its `from_pretrained`.
    """
    files = find_files(source, kind)
    state: State = {}
    for file in files:
        state |= load_state_dict(file, mapped=True)
    if kind.layout.decoder not in state:
        raise CheckpointError(
            f"{files[-1]}: not a {kind.layout.name} tokenizer: it holds no {kind.layout.decoder!r} "
            f"(its first tensor is {next(iter(state))!r})."
        )
    state = kind.original_names(state)
    if vision is not None or not any(name.startswith(VISION) for name in state):
        files = [*files, _vision_file(files[-1].parent, vision)]
        state |= {VISION + name: value for name, value in read_vision(files[-1]).items()}
    config = config or saved_config(kind, files[0].parent) or kind.config_class.released(state)
    return config, state, " and ".join(map(str, files))


def find_files(source: str | Path, kind: Any) -> list[Path]:
    """Weight files of a source, without the vision encoder's. Raises CheckpointError: one is missing."""
    place, layout = Path(source).expanduser(), kind.layout
    if not os.path.exists(place):  # Path.exists raises for a name that is too long
        if not is_hub_name(source):
            raise CheckpointError(
                f"{place}: no such {layout.name} tokenizer; {layout.advice(place)}."
            )
        stems = [str(Path(name).with_suffix(".*")) for name in (*layout.files, VISION_FILES[0])]
        place = fetch(str(source), (CONFIG, WEIGHTS, *stems), layout.advice(place))
    folder = place if place.is_dir() else place.parent
    released = layout.find(folder)
    if place.is_file():
        return [*released[:-1], place] if place in released else [place]
    if (folder / WEIGHTS).is_file() and (
        saved_config(kind, folder) or len(released) < len(layout.files)
    ):
        return [folder / WEIGHTS]
    if len(released) < len(layout.files):
        raise CheckpointError(
            f"{folder}: holds no {layout.name} tokenizer ({' and '.join(layout.files)}); "
            f"{layout.advice(folder)}."
        )
    return released


def saved_config(kind: Any, folder: Path) -> Any:
    """Sizes in a folder's `config.json`, None without one or if it is another model's (the text tokenizer's, the
    LLM's)."""
    file = folder / CONFIG
    ours = file.is_file() and read_json_object(file).get("model_type") == kind.model_type
    return kind.read_config(file) if ours else None


# ---- the vision encoder


def _vision_file(folder: Path, vision: str | Path | None) -> Path:
    cached = Path(torch.hub.get_dir()) / "checkpoints"  # where the original programs download it to
    file = (
        Path(vision)
        if vision is not None
        else first_file(folder, VISION_FILES) or first_file(cached, VISION_FILES)
    )
    if file is None or not os.path.isfile(file):
        raise CheckpointError(
            f"{file or folder / VISION_FILES[-1]}: no such vision-encoder file; download it "
            f"from {VISION_URL}."
        )
    return file


def read_vision(source: str | Path, sizes: EvaConfig | None = None) -> State:
    """EVA's tensors by their names in it: of `eva_vit_g.pth` (a file, its folder or a hub id), of a checkpoint that
    holds them as `visual_encoder.*`, or (ours) of a transformers CLIP folder, whose first `sizes.depth` layers are used
    (default: all).

    Raises:
        CheckpointError: missing (with download instructions), damaged, or of another model.
    """
    listed = Path(source) / CONFIG
    if listed.is_file() and str(read_json_object(listed).get("model_type")).startswith("clip"):
        clip = load_clip_vision(source, log=None)
        return eva_from_clip(
            clip.state_dict(),
            sizes or EvaConfig(depth=clip.config.num_hidden_layers, pre_norm=True),
        )
    file = find_file(source, VISION_FILES, f"download {VISION_URL} and give its path")
    state = load_state_dict(file, mapped=True)
    vision = {
        name.removeprefix(VISION): value for name, value in state.items() if name.startswith(VISION)
    } or state
    if "patch_embed.proj.weight" not in vision:
        raise CheckpointError(
            f"{file}: not an EVA vision encoder: it holds no 'patch_embed.proj.weight' "
            f"(its first tensor is {next(iter(state))!r})."
        )
    return vision


def load_vision(vit: EvaVit, source: str | Path, log: Log = print) -> LoadReport:
    """Fill a vision encoder from what `read_vision` reads; positions are resized, unused blocks left out."""
    report = fill_vision(vit, read_vision(source, vit.config), source)
    if log is not None:
        log(report.describe())
    return report


def fill_vision(vit: EvaVit, state: Mapping[str, Tensor], source: str | Path) -> LoadReport:
    """Load EVA's tensors into a vision encoder. Raises CheckpointError: missing tensor or another size."""
    return assign_strictly(
        vit,
        fit_positions(state, vit.config),
        source,
        foreign=True,
        allow_unexpected=[*UNUSED_IN_VISION, f"blocks.{vit.config.depth}.*"],
    )


def fit_positions(state: Mapping[str, Tensor], sizes: EvaConfig, prefix: str = "") -> State:
    name = f"{prefix}pos_embed"
    if name not in state or state[name].ndim != 3 or state[name].shape[1] == sizes.tokens:
        return dict(state)
    old = state[name]
    return {
        **state,
        name: torch.cat([old[:, :1], resize_square(old[0, 1:], sizes.grid)[None]], dim=1),
    }


# ---- the CLIP model of the target, BLIP-2


def load_clip_vision(
    source: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    log: Log = print,
) -> Any:
    """The frozen CLIP vision encoder of a transformers folder (a whole CLIP or its vision half) or hub id, in eval
    mode; its `.image_embeds` are stage 2's target.

    Raises:
        CheckpointError: missing (with instructions), damaged, or weights of another size than in config.json.
    """
    from transformers import CLIPVisionModelWithProjection

    return _load_clip(CLIPVisionModelWithProjection, source, device, dtype, log)


def load_clip_text(
    source: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    log: Log = print,
) -> Any:
    """The frozen text encoder of a CLIP folder or hub id; see `load_clip_vision`."""
    from transformers import CLIPTextModelWithProjection

    return _load_clip(CLIPTextModelWithProjection, source, device, dtype, log)


def _load_clip(
    kind: Any, source: str | Path, device: str | torch.device, dtype: torch.dtype, log: Log
) -> Any:
    folder = find_folder(source, (CONFIG, "*.safetensors", "*.bin", "*.index.json"), CLIP_ADVICE)
    values = read_json_object(folder / CONFIG, advice=CLIP_ADVICE)
    shared, state = read_encoder_link(folder), None
    if shared is not None:
        state = clip_from_eva(load_state_dict(shared[0]), shared[1]) | load_state_dict(
            folder / WEIGHTS
        )
    try:
        config = kind.config_class.from_pretrained(folder)
        # Of a whole CLIP its own value counts; the one in its vision_config is transformers' default.
        config.projection_dim = values.get("projection_dim", config.projection_dim)
        with quiet_loading("transformers"):
            model, info = kind.from_pretrained(
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
    missing = sorted(name for name in info["missing_keys"] if not name.endswith("position_ids"))
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} tensors are missing, first {missing[0]!r}; {CLIP_ADVICE}."
        )
    if log is not None:
        log(f"{folder}: {kind.__name__} loaded.")
    return model.to(device).requires_grad_(False).eval()


def load_blip2(model: Any, source: str | Path, log: Log = print) -> LoadReport:
    """Initialize a `Stage1Model` from `blip2_pretrained.pth` (a file, its folder or a hub id): Q-Former with text path,
    `ln_vision`, projections and temperature; never the vision encoder.

    Raises:
        CheckpointError: missing (with download instructions), damaged, of another model or size.
    """
    file = find_file(source, BLIP2_FILES, BLIP2_ADVICE)
    state = load_state_dict(file)
    if "query_tokens" not in state:
        raise CheckpointError(
            f"{file}: not a BLIP-2 stage-1 checkpoint: it holds no 'query_tokens' (its first tensor "
            f"is {next(iter(state))!r}); {BLIP2_ADVICE}."
        )
    report = assign_strictly(
        model,
        {name: value for name, value in state.items() if not name.startswith(VISION)},
        file,
        foreign=True,
        allow_unexpected=(
            "itm_head.*",
            *(() if hasattr(model.Qformer, "cls") else ("Qformer.cls.*",)),
        ),
        allow_missing=(f"{VISION}*", "embedding_head.*", "*position_ids", "Qformer.cls.*"),
    )
    if log is not None:
        log(report.describe())
    return report
