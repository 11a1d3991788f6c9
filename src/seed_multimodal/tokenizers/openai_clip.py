"""OpenAI's CLIP files (`ViT-L-14.pt`, LaVIT's `openai_clip_ViT-L-14.bin`) as transformers' `CLIPModel`.

Such a file is a state dict, or a TorchScript archive: a program with its tensors. Of an archive only the tensors are
read, by torch's restricted reader, to which the program's classes are names of empty objects; its code is not loaded.
"""

from __future__ import annotations

import re
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from torch import Tensor

from seed_multimodal.errors import CheckpointError, first_line
from seed_multimodal.tokenizers.checkpoints import empty_model
from seed_multimodal.weights import assign_strictly, load_state_dict

if TYPE_CHECKING:
    from transformers import CLIPModel

HEAD = 64  # of every CLIP that OpenAI published
# Sizes that archives hold as tensors, and tables that transformers makes itself.
IGNORED = ("input_resolution", "context_length", "vocab_size", "*attn_mask")
_LAYER = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
          "attn.out_proj": "self_attn.out_proj"}
_NAMES = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight", "logit_scale": "logit_scale"}
_NORMS = {"visual.ln_pre": "vision_model.pre_layrnorm", "visual.ln_post": "vision_model.post_layernorm",
          "ln_final": "text_model.final_layer_norm"}
_PROJECTIONS = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}


class _Part:
    """What stands for a module of an archive."""


def load_openai_clip(file: str | Path, *, device: str | torch.device = "cpu",
                     dtype: torch.dtype = torch.float32) -> CLIPModel:
    """The model of a file, frozen, in eval mode; sizes are those of its tensors.

    Raises:
        CheckpointError: missing, damaged, unsafe, or no CLIP with a ViT of OpenAI's.
    """
    from transformers import CLIPModel

    path = Path(file)
    state = _archive(path) if _is_archive(path) else load_state_dict(path)
    if "visual.conv1.weight" not in state or "text_projection" not in state:
        raise CheckpointError(f"{path}: not a CLIP of OpenAI's with a ViT: it holds no visual.conv1.weight or no "
                              f"text_projection (its first tensor is {next(iter(state))!r}).")
    model = empty_model(CLIPModel, _config(state), device, dtype)
    assign_strictly(model, dict(_renamed(state)), path, allow_missing=["*position_ids"], allow_unexpected=IGNORED)
    return model


def _renamed(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors as transformers has them."""
    for name, value in state.items():
        block = re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+?)(?:\.|_)(weight|bias)", name)
        module, _, kind = name.rpartition(".")
        if block:
            layer = f"{'vision' if block[1] else 'text'}_model.encoder.layers.{block[2]}."
            if block[3] == "attn.in_proj":
                for letter, part in zip("qkv", value.chunk(3), strict=True):
                    yield f"{layer}self_attn.{letter}_proj.{block[4]}", part
            else:
                yield f"{layer}{_LAYER.get(block[3], block[3])}.{block[4]}", value
        elif name in _PROJECTIONS:
            yield _PROJECTIONS[name], value.T.contiguous()
        elif module in _NORMS:
            yield f"{_NORMS[module]}.{kind}", value
        else:
            yield _NAMES.get(name, name), value


def _config(state: Mapping[str, Tensor]) -> Any:
    from transformers import CLIPConfig

    def tower(width: int, prefix: str) -> dict[str, Any]:
        depth = sum(name.startswith(f"{prefix}transformer.resblocks.") and name.endswith(".ln_1.weight")
                    for name in state)
        return {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": depth,
                "num_attention_heads": max(1, width // HEAD), "hidden_act": "quick_gelu"}

    patches = state["visual.conv1.weight"]
    side = round((len(state["visual.positional_embedding"]) - 1) ** 0.5)
    vocabulary, width = state["token_embedding.weight"].shape
    joint = state["text_projection"].shape[1]
    return CLIPConfig(
        projection_dim=joint,
        vision_config={**tower(len(patches), "visual."), "image_size": side * patches.shape[-1],
                       "patch_size": patches.shape[-1], "projection_dim": joint},
        text_config={**tower(width, ""), "vocab_size": vocabulary, "projection_dim": joint,
                     "max_position_embeddings": len(state["positional_embedding"]), "bos_token_id": vocabulary - 2,
                     "eos_token_id": vocabulary - 1})  # the end has the highest id: there the text is read off


def _is_archive(path: Path) -> bool:
    """Whether a file is a TorchScript archive."""
    if not path.is_file() or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as opened:
        return any(name.endswith("/constants.pkl") for name in opened.namelist())


def _archive(path: Path) -> dict[str, Tensor]:
    """The tensors of an archive by the names of its modules."""
    try:
        with tempfile.TemporaryFile() as copy:
            _without_code(path, copy)
            names = torch.serialization.get_unsafe_globals_in_checkpoint(copy)
            foreign = next((name for name in names if not name.startswith("__torch__.")), None)
            if foreign is not None:
                raise CheckpointError(f"{path}: refused, because it asks for {foreign}, which is no part of a model.")
            copy.seek(0)
            with torch.serialization.safe_globals([(type("Part", (_Part,), {}), name) for name in names]):
                root = torch.load(copy, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # noqa: BLE001 (a damaged archive fails in many ways)
        raise CheckpointError(f"{path}: not a complete TorchScript archive ({first_line(error)}).") from error
    return dict(_tensors(root, ""))


def _without_code(path: Path, copy: IO[bytes]) -> None:
    """An archive as a checkpoint: its data, without constants and program, so that torch reads it as one."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(copy, "w") as target:
        for entry in source.infolist():
            top, _, name = entry.filename.partition("/")
            name = name.removeprefix(".data/") if name == ".data/version" else name
            if name in ("data.pkl", "version", "byteorder") or name.startswith("data/"):
                with source.open(entry) as read, target.open(f"{top}/{name}", "w", force_zip64=True) as write:
                    while block := read.read(1 << 24):
                        write.write(block)
    copy.seek(0)


def _tensors(part: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, value in vars(part).items() if isinstance(part, _Part) else ():
        if isinstance(value, Tensor):
            yield prefix + name, value
        else:
            yield from _tensors(value, f"{prefix}{name}.")
