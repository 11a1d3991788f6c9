"""Scores of drawn pictures: how well CLIP finds that they fit their texts, and their distance from real ones (FID).

    clip = ClipScores.load("openai_clip_ViT-L-14.bin", device)
    clip.cosines(["a red fox"], [[first, second]])     # one row of two numbers

FID (Heusel et al. 2017) is torchmetrics', with the Inception network of torch-fidelity.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from seed_multimodal.errors import CheckpointError, first_line, how_to_install
from seed_multimodal.evaluation.tokenizer_text import clip_tokenizer, has_clip_tokenizer
from seed_multimodal.hub import DOWNLOADS_OFF
from seed_multimodal.images.transforms import ImageTransform, plain_rgb, resize_passes, to_bytes
from seed_multimodal.tokenizers.clip_weights import load_clip_text, load_clip_vision
from seed_multimodal.tokenizers.openai_clip import load_openai_clip
from seed_multimodal.weights import load_state_dict

INCEPTION = "weights-inception-2015-12-05-6726825d.pth"  # of torch-fidelity, with the start of its SHA-256
CLIP_HUB = "openai/clip-vit-large-patch14"
CLIP_WHERE = (f"put {CLIP_HUB} of the Hugging Face hub at pretrained/clip-vit-large-patch14, or name another CLIP "
              "folder or OpenAI's file by --clip")


@dataclass(frozen=True)
class ClipScores:
    """Both towers of a CLIP, in fp32.

    Attributes:
        name: of the folder or file. vision: normalised pixels [N, 3, S, S] → features [N, E]. text: ids and mask
            [N, L] → features [N, E]. size: S. most: the longest text in ids, marks included.
    """

    name: str
    vision: Callable[[Tensor], Tensor]
    text: Callable[[Tensor, Tensor], Tensor]
    tokenizer: Any
    size: int
    most: int
    device: torch.device

    @classmethod
    def load(cls, place: str | Path, device: torch.device, words: str | Path | None = None) -> ClipScores:
        """A CLIP folder of transformers, or a file of OpenAI's.

        Args:
            words: folder with CLIP's tokenizer, which a file does not hold (default: beside it, in its `tokenizer`
                folder, or at `CLIP_HUB`'s place below pretrained).

        Raises:
            CheckpointError: weights or tokenizer that are not there: what to put where.
        """
        path = Path(place)
        if path.is_file():
            both = load_openai_clip(path, device=device)
            vision, text = both.get_image_features, both.get_text_features
            near = [path.parent, path.parent / "tokenizer", Path("pretrained") / CLIP_HUB.rpartition("/")[2]]
            found = next((one for one in near if has_clip_tokenizer(one)), near[-1])
            tokenizer = clip_tokenizer(Path(words) if words is not None else found)
            sizes = both.config.vision_config.image_size, both.config.text_config.max_position_embeddings
            return cls(path.name, lambda pixels: _features(vision(pixel_values=pixels)),
                       lambda ids, mask: _features(text(input_ids=ids, attention_mask=mask)), tokenizer, *sizes, device)
        seeing, reading = load_clip_vision(path, device=device, log=None), load_clip_text(path, device=device, log=None)
        return cls(path.name, lambda pixels: seeing(pixel_values=pixels).image_embeds,
                   lambda ids, mask: reading(input_ids=ids, attention_mask=mask).text_embeds,
                   clip_tokenizer(path if words is None else Path(words)), seeing.config.image_size,
                   reading.config.max_position_embeddings, device)

    @torch.no_grad()
    def cosines(self, texts: Sequence[str], pictures: Sequence[Sequence[Image.Image]]) -> list[list[float]]:
        """Cosines of each text with its pictures, which are squashed to CLIP's square."""
        ids = self.tokenizer(list(texts), padding=True, truncation=True, max_length=self.most, return_tensors="pt")
        read = self.text(ids.input_ids.to(self.device), ids.attention_mask.to(self.device))
        words = F.normalize(read.float(), dim=-1)
        transform = ImageTransform(self.size, interpolation="bicubic")
        found = []
        for row, several in zip(words, pictures, strict=True):
            pixels = torch.stack([transform(picture) for picture in several]).to(self.device)
            found.append((F.normalize(self.vision(pixels).float(), dim=-1) @ row).tolist())
        return found

    def is_cut(self, text: str) -> bool:
        """Whether a text is longer than CLIP reads."""
        return len(self.tokenizer(text, truncation=False, verbose=False).input_ids) > self.most


def _features(given: Any) -> Tensor:
    found: Tensor = given if isinstance(given, Tensor) else given.pooler_output
    return found


@dataclass(frozen=True)
class Distance:
    """FID.

    Attributes:
        resolution: real pictures are squashed to this square first.
        inception: file of the network's weights; None: torch-fidelity's own, in torch's cache; downloaded once where
            HF_HUB_OFFLINE=0 allows it.
        features: another network: pictures [B, 3, H, W] in 0 to 1 → [B, E], E its `num_features`.
    """

    resolution: int = 512
    inception: str | Path | None = None
    features: nn.Module | None = None
    device: torch.device = torch.device("cpu")

    def missing(self) -> str:
        """Why it cannot be computed, in a sentence; "": it can."""
        try:
            self._metric()
        except (ImportError, OSError, RuntimeError, CheckpointError) as error:  # packages; download or file of weights
            return (f"FID is not computed ({first_line(error)}): it needs torchmetrics and torch-fidelity "
                    f"({how_to_install('torchmetrics', 'torch_fidelity')}) and the Inception weights, {INCEPTION} "
                    "(--inception, or downloaded once with HF_HUB_OFFLINE=0).")
        return ""

    @torch.no_grad()
    def between(self, real: Iterable[Image.Image], made: Iterable[Image.Image]) -> float:
        """FID of drawn pictures, of which there are two at least, from real ones.

        Raises:
            ImportError, OSError, RuntimeError, CheckpointError: see `missing`.
        """
        metric, side = self._metric(), (self.resolution, self.resolution)
        for picture in real:
            squashed = resize_passes(plain_rgb(picture), side, Image.Resampling.BICUBIC)
            metric.update(self._pixels(squashed), real=True)
        for picture in made:
            metric.update(self._pixels(plain_rgb(picture)), real=False)
        return float(metric.compute())

    def _pixels(self, picture: Image.Image) -> Tensor:
        return to_bytes(picture)[None].to(self.device).float() / 255

    def _metric(self) -> Any:
        from torchmetrics.image.fid import FrechetInceptionDistance

        if self.features is not None:
            return FrechetInceptionDistance(self.features, normalize=True).to(self.device)
        tensors = load_state_dict(self.inception or _inception())
        with tempfile.TemporaryDirectory() as folder:  # torch-fidelity unpickles what it is given, so it gets our copy
            torch.save(tensors, f"{folder}/{INCEPTION}")
            metric = FrechetInceptionDistance(normalize=True, feature_extractor_weights_path=f"{folder}/{INCEPTION}")
        return metric.to(self.device)


def _inception() -> Path:
    from huggingface_hub import constants
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3 as url

    file = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION
    if not file.is_file():
        if constants.HF_HUB_OFFLINE:
            raise CheckpointError(DOWNLOADS_OFF)
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(file), hash_prefix=file.stem.rpartition("-")[2], progress=False)
    return file


def find_clip(given: str | Path | None, *folders: Path) -> Path:
    """The CLIP that is meant: a given one, else LaVIT's file in one of `folders`, else `CLIP_HUB`'s place.

    Raises:
        CheckpointError: there is none: what to put where.
    """
    if given is not None:
        return Path(given)
    places = [*(folder / "openai_clip_ViT-L-14.bin" for folder in folders),
              Path("pretrained") / CLIP_HUB.rpartition("/")[2]]
    found = next((place for place in places if place.exists()), None)
    if found is None:
        raise CheckpointError(f"There is no CLIP to choose the best of several drawings with: {CLIP_WHERE}, or draw "
                              "one picture a text (seed eval text2image --best-of 1).")
    return found
