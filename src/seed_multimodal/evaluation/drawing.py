"""Text-to-image evaluation: best of N by CLIP similarity, and FID to the captioned images."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from PIL import Image

from seed_multimodal.disk import JsonObject, text_stem
from seed_multimodal.errors import (
    CheckpointError,
    DataError,
    first_line,
    install_hint,
)
from seed_multimodal.evaluation.annotations import Sample
from seed_multimodal.evaluation.answers import Images, Line, Run, Scores, open_sample
from seed_multimodal.evaluation.openai_clip import load_openai_clip
from seed_multimodal.evaluation.retrieval import ClipEncoder, clip_texts
from seed_multimodal.images.io import open_image, save_image
from seed_multimodal.images.transforms import ImageTransform, plain_rgb, resize_passes, to_bytes
from seed_multimodal.nn.vision.clip import load_clip_vision
from seed_multimodal.pipelines.base import MultimodalSystem
from seed_multimodal.state_dicts import load_state_dict

if TYPE_CHECKING:
    from torchmetrics.image.fid import FrechetInceptionDistance

CLIP_FOLDER = Path("pretrained/clip-vit-large-patch14")
# Below about the number of Inception's features (2,048) the covariance is singular.
FID_IMAGES = 2000
# Of github.com/toshas/torch-fidelity, release v0.2.0.
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
BATCH = 32


class ClipScores:
    """Image and text encoder of a CLIP folder (transformers) or of OpenAI's file, in fp32.

    keep_ratio: images are cropped to squares, as by CLIP's own preprocessing; False: squashed.
    Raises CheckpointError: a part is missing.
    """

    def __init__(self, path: Path, device: torch.device, *, keep_ratio: bool = False) -> None:
        if path.is_file():
            vision, self.texts = load_openai_clip(path, device)
        else:
            vision = load_clip_vision(path, device=device, log=None)
            self.texts = clip_texts(path, device)
        transform = ImageTransform(
            vision.config.image_size, keep_ratio=keep_ratio, interpolation="bicubic"
        )
        self.images = ClipEncoder(vision, transform)

    def cosines(
        self, texts: Sequence[str], images: Sequence[Sequence[Image.Image]]
    ) -> list[list[float]]:
        """Cosines of each text with its images; texts are truncated to CLIP's length."""
        cosines: list[list[float]] = []
        text_features = self.texts(texts)  # [T, E]
        for text_feature, candidates in zip(text_features, images, strict=True):
            features = F.normalize(self.images.embed(candidates), dim=-1)  # [N, E]
            cosines.append((features @ text_feature).tolist())
        return cosines

    def image_cosine(self, image: Image.Image, other: Image.Image) -> float:
        """The cosine of two images (CLIP-I)."""
        features = F.normalize(self.images.embed([image, other]), dim=-1)  # [2, E]
        return float(features[0] @ features[1])


def find_clip(
    path: str | Path | None,
    purpose: str = "to select the best of several images",
    alternative: str = "generate one image per text (--best-of 1)",
) -> Path:
    """The CLIP folder, or OpenAI's file.

    path: None for the default. purpose, alternative: of the message about a missing one.
    Raises CheckpointError: missing.
    """
    clip = CLIP_FOLDER if path is None else Path(path)
    if not clip.exists():
        raise CheckpointError(
            f"{clip}: no CLIP {purpose}; put openai/{CLIP_FOLDER.name} of the Hugging Face hub "
            f"there, set --clip, or {alternative}."
        )
    return clip


def fid_metric(inception: Path | None) -> FrechetInceptionDistance:
    """FID (Heusel et al. 2017) by torchmetrics.

    Args:
        inception: torch-fidelity's weights (None: in torch's cache).

    Raises:
        ImportError: torchmetrics or torch-fidelity (the extra eval) is missing.
        CheckpointError: no or bad weights.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    file = Path(inception or f"{torch.hub.get_dir()}/checkpoints/{INCEPTION}")
    if not file.is_file():
        raise CheckpointError(
            f"{file}: no Inception weights; download torch-fidelity's (--inception)"
        )
    # torch-fidelity unpickles its input: pass tensors only.
    with tempfile.TemporaryDirectory() as folder:
        safe_file = f"{folder}/{INCEPTION}"
        torch.save(load_state_dict(file), safe_file)
        return FrechetInceptionDistance(normalize=True, feature_extractor_weights_path=safe_file)


def fid(
    metric: FrechetInceptionDistance, run: Run, samples: Sequence[Sample], drawings: Sequence[Path]
) -> float:
    """FID of two drawings or more from the images of their samples, which are made square first."""
    # Features of one batch at a time; the metric keeps their sums only.
    for start in range(0, len(samples), BATCH):
        batch = slice(start, start + BATCH)
        real = [_square_image(sample, run) for sample in samples[batch]]
        _update(metric, real, are_real=True)
        _update(metric, [open_image(path).image for path in drawings[batch]], are_real=False)
    return float(metric.compute())


def _square_image(sample: Sample, run: Run) -> Image.Image:
    """The real image of a sample; all have one."""
    image = open_sample(sample, run)
    assert image is not None
    size = (run.resolution, run.resolution)
    return resize_passes(plain_rgb(image), size, Image.Resampling.BICUBIC)


def _update(
    metric: FrechetInceptionDistance, images: Sequence[Image.Image], are_real: bool
) -> None:
    """Add images of one size to the metric."""
    pixels = torch.stack([to_bytes(image) for image in images])  # uint8 [B, 3, S, S]
    metric.update(pixels.to(metric.device).float() / 255, real=are_real)


def fid_note(images: int) -> str:
    """What to know about an FID of so few images, or ""."""
    if images >= FID_IMAGES:
        return ""
    return (
        f"FID of {images:,} images is biased and not comparable with that of other numbers: its "
        f"covariance needs {FID_IMAGES:,} or more."
    )


class CaptionDrawer:
    """`run.best_of` drawings of each caption; seeds count the `samples`.

    options: of `draw`.
    """

    def __init__(self, system: MultimodalSystem, run: Run, samples: Sequence[Sample]) -> None:
        self.system = system
        self.run = run
        self.indices = {sample.key: index for index, sample in enumerate(samples)}
        self.options: dict[str, Any] = {**run.options, "batch_size": run.batch}
        if run.prompts == "plain":
            self.options["verbatim"] = True

    def draw(self, samples: Sequence[Sample]) -> list[list[Image.Image]]:
        """The drawings of each sample's caption."""
        best_of = self.run.best_of
        captions = [sample.caption for sample in samples]
        seeds = [self.run.seed + best_of * self.indices[sample.key] for sample in samples]
        drawn_images = self.system.draw(captions, seeds, num_images=best_of, **self.options)
        starts = range(0, len(drawn_images), best_of)
        return [drawn_images[start : start + best_of] for start in starts]


class Drawings:
    """The task "text2image" with a system; file names count the `samples`."""

    def __init__(self, system: MultimodalSystem, run: Run, samples: Sequence[Sample]) -> None:
        self.system = system
        self.run = run
        self.drawer = CaptionDrawer(system, run, samples)
        self.clip = None if run.clip is None else ClipScores(run.clip, system.images.device)

    def answer(self, samples: Sequence[Sample], images: Images) -> list[Line]:
        """Generate, select and save the images of a batch."""
        # 1. `best_of` images of each caption.
        captions = [sample.caption for sample in samples]
        candidates = self.drawer.draw(samples)

        # 2. The best of each by CLIP; without it there is one.
        cosines = [[0.0]] * len(samples)
        if self.clip is not None:
            cosines = self.clip.cosines(captions, candidates)
        lines: list[Line] = []
        for sample, image, row, of_caption in zip(
            samples, images, cosines, candidates, strict=True
        ):
            best = of_caption[row.index(max(row))]
            # INDEX_CAPTION.png; the original's are JPEG.
            stem = f"{self.drawer.indices[sample.key]:06d}_{text_stem(sample.caption)}"
            path = self.run.out / f"{stem}.{'jpg' if self.run.original else 'png'}"
            save_image(best, path, DataError)
            line: Line = {"caption": sample.caption, "image": path.name}
            if self.clip is not None:
                line["clip"] = round(max(row), 4)
                if image is not None:
                    line["clip_image"] = round(self.clip.image_cosine(best, image), 4)
            lines.append(line)
        return lines

    def score(self, samples: Sequence[Sample], lines: Sequence[Line]) -> Scores:
        """File names of the images; their mean CLIP cosine, and FID if all captions have images."""
        # 1. Results of the captions that were drawn.
        drawn_samples: list[Sample] = []
        results: list[JsonObject] = []
        cosines: dict[str, list[float]] = {"clip": [], "clip_image": []}
        for sample, line in zip(samples, lines, strict=True):
            if "image" not in line:
                continue
            drawn_samples.append(sample)
            results.append({"id": sample.key, "caption": line["caption"], "image": line["image"]})
            if "clip" in line:
                cosines["clip"].append(line["clip"])
            if "clip_image" in line:
                cosines["clip_image"].append(line["clip_image"])

        # 2. Scores; texts without images have no FID.
        scores = Scores(results, {})
        for name, values in cosines.items():
            if values:
                scores.values[name] = round(sum(values) / len(values), 4)
        has_images = all(sample.image is not None for sample in drawn_samples)
        if len(drawn_samples) > 1 and has_images:
            self._add_fid(scores, drawn_samples)
        return scores

    def _add_fid(self, scores: Scores, samples: Sequence[Sample]) -> None:
        """Add FID, or a note why there is none."""
        # Its packages and weights are optional.
        files = [self.run.out / result["image"] for result in scores.results]
        try:
            metric = fid_metric(self.run.inception).to(self.system.images.device)
            scores.values["fid"] = round(fid(metric, self.run, samples, files), 4)
        except (ImportError, CheckpointError) as error:
            hint = install_hint("torchmetrics", "torch_fidelity")
            reason = f"({first_line(error)}): it needs the Inception weights and {hint}."
            scores.notes.append(f"FID is not computed {reason}")
            return
        note = fid_note(len(samples))
        if note:
            scores.notes.append(note)
