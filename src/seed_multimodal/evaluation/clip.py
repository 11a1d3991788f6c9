"""CLIP, by which images and texts are compared: a folder of transformers, or OpenAI's weights in
one file, as LaVIT's folder holds them (`openai_clip_ViT-L-14.bin`).

    clip = Clip(Path("pretrained/LaVIT-7B-v2/openai_clip_ViT-L-14.bin"), device)
    cosines = clip.images(drawings) @ clip.texts(["a fox"]).T

The word pieces of OpenAI's file are those of `bpe_simple_vocab_16e6.txt.gz`, next to it or in the
package salesforce-lavis.
"""

from __future__ import annotations

import gzip
import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from seed_multimodal.config import read_table
from seed_multimodal.errors import CheckpointError
from seed_multimodal.evaluation.metrics import finite
from seed_multimodal.images.transforms import ImageTransform
from seed_multimodal.nn.vision.clip import load_clip_text, load_clip_vision
from seed_multimodal.state_dicts import assign_strictly, load_state_dict

TextEncoder = Callable[[Sequence[str]], Tensor]  # texts → unit features [T, E]
NAME = "openai_clip_ViT-L-14.bin"
PIECES = "bpe_simple_vocab_16e6.txt.gz"
# Those that CLIP uses; two pieces for each byte come before, two special ones after.
MERGES = 49_152 - 256 - 2
# Patterns of OpenAI's names → transformers', one after another.
RENAMED: list[tuple[str, str]] = read_table(__file__)


class Clip:
    """Image and text encoder of a CLIP folder (transformers) or of OpenAI's file, in fp32.

    texts: texts, which are truncated to CLIP's length → unit features [T, E].
    keep_ratio: images are cropped to squares, as by CLIP's own preprocessing; False: squashed.
    Raises CheckpointError: a part is missing.
    """

    def __init__(self, path: Path, device: torch.device, *, keep_ratio: bool = False) -> None:
        self.path = path
        if path.is_file():
            vision, self.texts = load_openai_clip(path, device)
        else:
            vision = load_clip_vision(path, device=device, log=None)
            self.texts = clip_texts(path, device)
        transform = ImageTransform(
            vision.config.image_size, keep_ratio=keep_ratio, interpolation="bicubic"
        )
        self.encoder = ClipEncoder(vision, transform)

    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit features [N, E]. Raises DataError: not finite."""
        features = F.normalize(self.encoder.embed(images), dim=-1)
        finite(features.cpu(), str(self.path))
        return features


# ---- encoders


@dataclass(frozen=True)
class ClipEncoder:
    """A frozen CLIP vision encoder with the transform of its images."""

    model: CLIPVisionModelWithProjection
    transform: ImageTransform

    @torch.no_grad()
    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """Embeddings of images of any sizes, float32 [N, E]."""
        pixels = self.transform.batch(images).to(self.model.device, self.model.dtype)
        return self.model(pixel_values=pixels).image_embeds.float()


def clip_texts(source: str | Path, device: torch.device) -> TextEncoder:
    """The text encoder of a CLIP folder.

    Raises CheckpointError: no folder, no text encoder, or no tokenizer.
    """
    folder = Path(source)
    encoder = load_clip_text(folder, device)
    if not any((folder / name).is_file() for name in ("vocab.json", "tokenizer.json")):
        raise CheckpointError(f"{folder}: holds no CLIP tokenizer (vocab.json and merges.txt).")
    tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    return text_embedder(encoder, tokenizer, device)


def text_embedder(
    encoder: CLIPTextModelWithProjection, tokenizer: CLIPTokenizer, device: torch.device
) -> TextEncoder:
    """Texts → normalised embeddings, by a CLIP text model and its tokenizer."""
    max_length = encoder.config.max_position_embeddings

    @torch.no_grad()
    def embed(texts: Sequence[str]) -> Tensor:
        inputs = tokenizer(
            list(texts), padding=True, truncation=True, max_length=max_length, return_tensors="pt"
        )
        return F.normalize(encoder(**inputs.to(device)).text_embeds.float(), dim=-1)

    return embed


# ---- OpenAI's file


def load_openai_clip(
    file: str | Path, device: torch.device
) -> tuple[CLIPVisionModelWithProjection, TextEncoder]:
    """Vision encoder (with `.image_embeds`) and text encoder, in fp32.

    Raises CheckpointError: another file, or no word pieces.
    """
    # 1. The weights; torch reads TorchScript archives, which are programs, by torch.jit.load only.
    try:
        state = load_state_dict(file)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error} OpenAI's own archive is a TorchScript program, which is not run: save its "
            "state_dict() in its place, or name a transformers folder by --clip."
        ) from error
    for name in ("visual.proj", "text_projection", "visual.conv1.weight", "positional_embedding"):
        if name not in state:
            raise CheckpointError(
                f"{file}: not the weights of OpenAI's CLIP, it holds no {name!r}; name a "
                "transformers folder by --clip."
            )

    # 2. The models, whose sizes are those of their tensors.
    patches = len(state["visual.positional_embedding"]) - 1
    width, _, patch, _ = state["visual.conv1.weight"].shape
    image_size = patch * int(patches**0.5 + 0.5)
    sizes = _sizes(state, "visual.", "visual.proj", width)
    vision_config = CLIPVisionConfig(**sizes, patch_size=patch, image_size=image_size)
    vocab_size, width = state["token_embedding.weight"].shape
    text_config = CLIPTextConfig(
        **_sizes(state, "", "text_projection", width),
        vocab_size=vocab_size,
        max_position_embeddings=len(state["positional_embedding"]),
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
        pad_token_id=vocab_size - 1,
    )
    vision = CLIPVisionModelWithProjection(vision_config)
    text = CLIPTextModelWithProjection(text_config)

    # 3. The weights in them.
    renamed = _renamed(state)
    for model, others in ((vision, "text_*"), (text, "vis*")):
        assign_strictly(model, renamed, file, allow_unexpected=["*position_ids", others])
        model.to(device).requires_grad_(False).eval()
    return vision, text_embedder(text, read_pieces(Path(file).parent), device)


def _sizes(state: Mapping[str, Tensor], part: str, projection: str, width: int) -> dict[str, int]:
    """Sizes of a Transformer that transformers' configurations have in common."""
    pattern = re.compile(rf"{re.escape(part)}transformer\.resblocks\.(\d+)")
    blocks = {match[1] for match in map(pattern.match, state) if match}
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": max(width // 64, 1),
        "projection_dim": state[projection].shape[1],
    }


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by transformers' names, without the file's scalars (such as `logit_scale`)."""
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        if not value.ndim:
            continue
        for pattern, new in RENAMED:
            name = re.sub(pattern, new, name)
        block, separator, kind = name.partition(".attn.in_proj_")
        if separator:  # queries, keys and values in one
            for letter, part in zip("qkv", value.float().chunk(3), strict=True):
                renamed[f"{block}.self_attn.{letter}_proj.{kind}"] = part
        elif name.endswith("projection.weight"):  # OpenAI multiplies from the right
            renamed[name] = value.float().T.contiguous()
        else:
            renamed[name] = value.float()
    return renamed


def read_pieces(folder: Path) -> CLIPTokenizer:
    """CLIP's tokenizer of transformers. Raises CheckpointError: no file of word pieces."""
    # 1. The file, in the folder or in the package.
    folders = [folder]
    lavis = importlib.util.find_spec("lavis")
    if lavis is not None:
        packages = lavis.submodule_search_locations or ()
        folders += [Path(package) / "models" / "clip_models" for package in packages]
    files = [parent / PIECES for parent in folders if (parent / PIECES).is_file()]
    if not files:
        raise CheckpointError(
            f"{folder / PIECES}: CLIP's word pieces are not there, nor salesforce-lavis, which has "
            "them; put that file of OpenAI's CLIP there, or name a transformers folder by --clip."
        )

    # 2. The vocabulary in CLIP's order: bytes, bytes that end a word, merges, special tokens.
    merges = gzip.decompress(files[0].read_bytes()).decode().split("\n")[1 : MERGES + 1]
    letters = list(bytes_to_unicode().values())
    pieces = [
        *letters,
        *(f"{letter}</w>" for letter in letters),
        *("".join(line.split()) for line in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    vocabulary = {piece: id for id, piece in enumerate(pieces)}
    return CLIPTokenizer(vocabulary, [tuple(line.split()) for line in merges])
