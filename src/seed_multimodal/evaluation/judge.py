"""The independent scorer: a small picture-text model that judges rebuilt and drawn pictures at 32 px.

It is trained by `seed_multimodal.evaluation.train_judge` on all splits (so that it can score the held-out pictures),
from another seed and with another architecture (a ResNet with batch norm and a word-level text tower) than the system's
own vision tower, and is never used in the system's training.

    judge = Judge.from_pretrained("pretrained/nano/judge")
    images, texts = judge.embed_images(pictures), judge.embed_texts(["twemoji style cat"])
    (images @ texts.T)            # cosine, [N, M]

The vocabulary is in config.json, so the folder is complete; the head pools 2x2 regions, because a mean
over the whole picture cannot tell a left arrow from a right one; styles are read by a linear head.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from seed_multimodal.disk import replace_text
from seed_multimodal.errors import CheckpointError, DataError
from seed_multimodal.weights import assign_strictly, load_state_dict, save_state_dict

_WORD = re.compile(r"[^\W_]+")
_ARTICLES = {"a", "an", "the"}
PAD, UNKNOWN = 0, 1
Pictures = Sequence[Image.Image] | NDArray[np.uint8]


@dataclass
class JudgeConfig:
    """Sizes of a judge; `words[i]` has id i + 2 (0 is padding, 1 an unknown word); `styles` orders the style head."""

    words: list[str] = field(default_factory=list)
    styles: list[str] = field(default_factory=list)
    image_size: int = 32
    widths: tuple[int, ...] = (64, 96, 128)
    blocks: int = 2
    embed_dim: int = 160
    word_dim: int = 48
    text_width: int = 128
    text_layers: int = 1
    text_heads: int = 4
    max_words: int = 24
    training: dict[str, Any] = field(default_factory=dict)


def split_words(text: str) -> list[str]:
    """Lower-case words of a text without articles; punctuation and underscores separate words."""
    return [word for word in _WORD.findall(text.lower()) if word not in _ARTICLES]


def canonical_caption(record: Any) -> str:
    """The first caption of a `NanoRecord`: it names style and thing, and pictures are drawn from it."""
    return str(record.captions[0])


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm and a shortcut; `stride` 2 halves the picture."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] → [B, outputs, H/stride, W/stride]."""
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.shortcut(x) + self.norm2(self.conv2(y)))


class ImageTower(nn.Module):
    """ResNet: [B, 3, S, S] in -1..1 → [B, embed_dim], not normalised."""

    def __init__(self, config: JudgeConfig) -> None:
        super().__init__()
        first = config.widths[0]
        self.stem = nn.Conv2d(3, first, 4, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(first)
        layers: list[nn.Module] = []
        inputs = first
        for stage, width in enumerate(config.widths):
            for block in range(config.blocks):
                layers.append(ResidualBlock(inputs, width, 2 if stage and block == 0 else 1))
                inputs = width
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(inputs * 4, config.embed_dim)

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, S] → [B, embed_dim]."""
        x = self.body(F.relu(self.norm(self.stem(pixels))))
        return self.head(F.adaptive_avg_pool2d(x, 2).flatten(1))


class TextTower(nn.Module):
    """Word-level transformer: ids [B, L] (0 is padding) → [B, embed_dim], not normalised."""

    def __init__(self, config: JudgeConfig) -> None:
        super().__init__()
        width = config.text_width
        self.words = nn.Embedding(len(config.words) + 2, config.word_dim, padding_idx=PAD)
        self.expand = nn.Linear(config.word_dim, width)
        self.positions = nn.Parameter(torch.randn(config.max_words, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, config.text_heads, 2 * width, 0.0, "gelu", batch_first=True,
                                           norm_first=True)
        self.body = nn.TransformerEncoder(layer, config.text_layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, config.embed_dim)

    def forward(self, ids: Tensor) -> Tensor:
        """[B, L] int64 → [B, embed_dim]; the mean over real words is projected."""
        padding = ids == PAD
        x = self.expand(self.words(ids)) + self.positions[: ids.shape[1]]
        x = self.norm(self.body(x, src_key_padding_mask=padding))
        real = (~padding).unsqueeze(-1).to(x.dtype)
        return self.head((x * real).sum(1) / real.sum(1).clamp(min=1))


class Judge(nn.Module):
    """Both towers, a temperature and a style head; see the module's docstring."""

    def __init__(self, config: JudgeConfig) -> None:
        super().__init__()
        self.config = config
        self.image = ImageTower(config)
        self.text = TextTower(config)
        self.style = nn.Linear(config.embed_dim, max(len(config.styles), 1))
        self.log_scale = nn.Parameter(torch.tensor(2.66))
        self._ids = {word: i + 2 for i, word in enumerate(config.words)}

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device = "cpu") -> Judge:
        """Load `config.json` and `model.safetensors` of `folder`, in fp32 and in evaluation mode.

        Raises:
            CheckpointError: when a file is missing, damaged or of another model.
        """
        file = Path(folder) / "config.json"
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
            config = JudgeConfig(**{**raw, "widths": tuple(raw["widths"])})
        except FileNotFoundError as error:
            raise CheckpointError(f"{file}: there is no judge in this folder; train one with "
                                  "`python -m seed_multimodal.evaluation.train_judge`.") from error
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise CheckpointError(f"{file}: not a judge's config ({error}).") from error
        judge = cls(config)
        source = file.with_name("model.safetensors")
        state = load_state_dict(source)
        assign_strictly(judge, {k: v.float() if v.is_floating_point() else v for k, v in state.items()}, source)
        return judge.to(device).eval().requires_grad_(False)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write `config.json` and `model.safetensors` (fp16) into `folder`, the weights first."""
        target = Path(folder)
        state = {k: v.half() if v.is_floating_point() else v for k, v in self.state_dict().items()}
        save_state_dict(state, target / "model.safetensors")
        replace_text(target / "config.json", json.dumps(asdict(self.config), ensure_ascii=False) + "\n")
        return target

    def word_ids(self, texts: Sequence[str]) -> Tensor:
        """Ids [B, L] of texts, padded with 0 and cut to `max_words`; an empty text is one unknown word."""
        rows = [[self._ids.get(w, UNKNOWN) for w in split_words(t)][: self.config.max_words] or [UNKNOWN]
                for t in texts]
        length = max((len(row) for row in rows), default=1)
        return torch.tensor([row + [PAD] * (length - len(row)) for row in rows], dtype=torch.int64).view(-1, length)

    @torch.inference_mode()
    def embed_images(self, pictures: Pictures, batch: int = 256) -> Tensor:
        """Unit vectors [N, embed_dim] (fp32, CPU) of PIL pictures of any sizes or uint8 [N, H, W, 3]."""
        device = self.log_scale.device
        parts = [F.normalize(self.image(pixels_of(pictures[i : i + batch], self.config.image_size).to(device)), dim=1)
                 for i in range(0, len(pictures), batch)]
        return torch.cat(parts).float().cpu() if parts else torch.zeros(0, self.config.embed_dim)

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str], batch: int = 512) -> Tensor:
        """Unit vectors [N, embed_dim] (fp32, CPU) of texts."""
        device = self.log_scale.device
        parts = [F.normalize(self.text(self.word_ids(texts[i : i + batch]).to(device)), dim=1)
                 for i in range(0, len(texts), batch)]
        return torch.cat(parts).float().cpu() if parts else torch.zeros(0, self.config.embed_dim)

    @torch.inference_mode()
    def styles_of(self, embeddings: Tensor) -> list[str]:
        """Most likely style of each picture embedding [N, embed_dim] (as `embed_images` gives them)."""
        best = self.style(embeddings.to(self.log_scale.device)).argmax(1)
        return [self.config.styles[i] for i in best.tolist()]


def pixels_of(pictures: Pictures, size: int) -> Tensor:
    """Pictures as float32 [N, 3, size, size] in -1..1; shrinking averages areas, so no detail is aliased.

    Raises:
        DataError: when an array is not uint8 [N, H, W, 3].
    """
    if isinstance(pictures, np.ndarray):
        if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[-1] != 3:
            raise DataError(f"the judge needs uint8 pictures [N, H, W, 3], got {pictures.dtype} {pictures.shape}.")
        return shrink(torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1, size)
    rows = [torch.from_numpy(np.array(p.convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1 for p in pictures]
    return torch.cat([shrink(row[None], size) for row in rows]) if rows else torch.zeros(0, 3, size, size)


def shrink(pixels: Tensor, size: int) -> Tensor:
    """[N, 3, H, W] → [N, 3, size, size] by area means, or bilinear where a side must grow."""
    if min(pixels.shape[-2:]) >= size:
        return F.interpolate(pixels, size=(size, size), mode="area")
    return F.interpolate(pixels, size=(size, size), mode="bilinear", align_corners=False)
