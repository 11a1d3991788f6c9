"""Text-to-image evaluation: best of N by CLIP similarity, and FID to the captioned images."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from seed_multimodal.disk import atomic_open, writing
from seed_multimodal.errors import (
    CheckpointError,
    DataError,
    GenerationError,
    first_line,
    install_hint,
)
from seed_multimodal.evaluation.annotations import Sample
from seed_multimodal.evaluation.answers import Line, Run, open_sample
from seed_multimodal.evaluation.openai_clip import load_openai_clip
from seed_multimodal.evaluation.retrieval import clip_texts
from seed_multimodal.images.io import open_image
from seed_multimodal.images.transforms import ImageTransform, plain_rgb, resize_passes, to_bytes
from seed_multimodal.inference.prompt import Prompt
from seed_multimodal.language.answer import AnswerReader, ImagePart
from seed_multimodal.seed.checkpoints import load_clip_vision
from seed_multimodal.seed.pipeline import SeedLlama
from seed_multimodal.weights import load_state_dict

CLIP_FOLDER = Path("pretrained/clip-vit-large-patch14")
FID_IMAGES = (
    2000  # below about the number of Inception's features (2,048) the covariance is singular
)
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"  # of github.com/toshas/torch-fidelity, release v0.2.0
BATCH = 32


class ClipScores:
    """Image and text encoder of a CLIP folder (transformers) or of OpenAI's file, in fp32. Raises CheckpointError: a
    part is missing."""

    def __init__(self, place: Path, device: torch.device) -> None:
        if place.is_file():
            self.vision, self.texts = load_openai_clip(place, device)
        else:
            self.vision, self.texts = (
                load_clip_vision(place, device=device, log=None),
                clip_texts(place, device),
            )
        self.transform = ImageTransform(self.vision.config.image_size, interpolation="bicubic")

    @torch.no_grad()
    def cosines(
        self, texts: Sequence[str], images: Sequence[Sequence[Image.Image]]
    ) -> list[list[float]]:
        """Cosines of each text with its images; texts are truncated to CLIP's length."""
        found, device = [], self.vision.device
        for row, several in zip(self.texts(texts), images, strict=True):
            pixels = self.transform.batch(list(several)).to(device)
            found.append(
                (F.normalize(self.vision(pixel_values=pixels).image_embeds, dim=-1) @ row).tolist()
            )
        return found


def find_clip(
    given: str | Path | None, other: str = "generate one image per text (--best-of 1)"
) -> Path:
    """The CLIP folder, or OpenAI's file, for ranking candidates. Raises CheckpointError: missing, with instructions;
    `other`: a further one."""
    place = CLIP_FOLDER if given is None else Path(given)
    if not place.exists():
        raise CheckpointError(
            f"{place}: no CLIP to select the best of several images; put openai/{CLIP_FOLDER.name} "
            f"of the Hugging Face hub there, set --clip, or {other}."
        )
    return place


def fid_metric(inception: Path | None) -> Any:
    """FID (Heusel et al. 2017) by torchmetrics; `inception`: torch-fidelity's weights (None: in torch's cache).

    Raises:
        ImportError: torchmetrics or torch-fidelity (the extra eval) is missing. CheckpointError: no or bad weights.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    file = Path(inception or f"{torch.hub.get_dir()}/checkpoints/{INCEPTION}")
    if not file.is_file():
        raise CheckpointError(
            f"{file}: no Inception weights; download torch-fidelity's (--inception)"
        )
    with (
        tempfile.TemporaryDirectory() as folder
    ):  # torch-fidelity unpickles its input: pass tensors only
        torch.save(load_state_dict(file), f"{folder}/{INCEPTION}")
        return FrechetInceptionDistance(
            normalize=True, feature_extractor_weights_path=f"{folder}/{INCEPTION}"
        )


def fid(metric: Any, run: Run, samples: Sequence[Sample], drawn: Sequence[Path]) -> float:
    """FID of two drawings or more from the images of their samples, which are resized to a square first."""
    for start in range(0, len(samples), BATCH):
        real = [plain_rgb(open_sample(one, run)) for one in samples[start : start + BATCH]]
        squares = [
            resize_passes(image, (run.resolution, run.resolution), Image.Resampling.BICUBIC)
            for image in real
        ]
        for images, are_real in (
            (squares, True),
            ([open_image(path) for path in drawn[start : start + BATCH]], False),
        ):
            pixels = torch.stack(list(map(to_bytes, images))).to(metric.device)
            metric.update(pixels.float() / 255, real=are_real)
    return float(metric.compute())


def fid_note(images: int) -> str:
    """What to know about an FID of so few images, or ""."""
    if images >= FID_IMAGES:
        return ""
    return (
        f"FID of {images:,} images is biased and not comparable with that of other numbers: its covariance needs "
        f"{FID_IMAGES:,} or more."
    )


def save_drawing(
    image: Image.Image, folder: Path, number: int, text: str, jpeg: bool = False
) -> str:
    """Save as NUMBER_CAPTION.png; returns the file's name. Raises DataError: the disk refuses."""
    stem = "".join(letter if letter.isalnum() else "_" for letter in text).strip("_")[:60]
    stem = stem.encode()[:180].decode(errors="ignore") or "image"  # file names have 255 bytes
    path = folder / f"{number:06d}_{stem}.{'jpg' if jpeg else 'png'}"
    with writing(path, DataError), atomic_open(path) as file:
        image.save(file, "JPEG" if jpeg else "PNG")
    return path.name


def unconditional_codes(system: SeedLlama, options: Mapping[str, Any]) -> list[int]:
    """The codes generated after `<s><img>`, the original script's negative condition."""
    settings = replace(system.settings(**options), force_image=True)
    ids = system.generate([Prompt([system.tokenizer.bos_id])], settings)[0]
    parts = AnswerReader(system.tokenizer).read_all(ids).parts
    codes = [list(part.codes) for part in parts if isinstance(part, ImagePart)]
    if not codes:
        raise GenerationError("The model generates no complete image without a caption.")
    return codes[0]


class Drawings:
    """The task "text2image" with a system; seeds and file names count the `samples`."""

    def __init__(self, system: Any, run: Run, samples: Sequence[Sample]) -> None:
        self.system, self.run, self.options = system, run, {**run.options, "batch_size": run.batch}
        self.numbers = {one.key: number for number, one in enumerate(samples)}
        self.clip = None if run.clip is None else ClipScores(run.clip, system.images.device)
        if isinstance(system, SeedLlama) and run.prompts == "plain":
            self.options["verbatim"] = True
        if isinstance(system, SeedLlama) and run.original:
            generation = {
                key: value
                for key, value in run.options.items()
                if key not in system.drawing_settings
            }
            self.options["negative_codes"] = unconditional_codes(system, generation)

    def answer(self, samples: Sequence[Sample], images: Sequence[Any]) -> list[Line]:
        """Generate, select and save the images of a batch."""
        run, texts, lines = self.run, [one.caption for one in samples], list[Line]()
        seeds = [run.seed + run.best_of * self.numbers[one.key] for one in samples]
        drawn = self.system.draw(texts, seeds, num_images=run.best_of, **self.options)
        several = [
            drawn[start : start + run.best_of] for start in range(0, len(drawn), run.best_of)
        ]
        cosines = [[0.0]] * len(texts) if self.clip is None else self.clip.cosines(texts, several)
        for one, row, own in zip(samples, cosines, several, strict=True):
            best = max(range(len(row)), key=row.__getitem__)
            name = save_drawing(
                own[best], run.out, self.numbers[one.key], one.caption, run.original
            )
            chosen = {} if self.clip is None else {"clip": round(row[best], 4)}
            lines.append({"caption": one.caption, "image": name, **chosen})
        return lines

    def score(
        self, samples: Sequence[Sample], lines: Mapping[Any, Line]
    ) -> tuple[Any, dict[str, Any]]:
        """File names of the images; their mean CLIP cosine, and FID if each caption belongs to an image."""
        drawn = [one for one in samples if "image" in lines[one.key]]
        results = [
            {"id": one.key, **{name: lines[one.key][name] for name in ("caption", "image")}}
            for one in drawn
        ]
        cosines = [lines[one.key]["clip"] for one in drawn if "clip" in lines[one.key]]
        numbers: dict[str, Any] = {"clip": round(sum(cosines) / len(cosines), 4)} if cosines else {}
        if len(drawn) > 1 and all(one.image is not None for one in drawn):
            files = [self.run.out / one["image"] for one in results]
            try:
                metric = fid_metric(self.run.inception).to(self.system.images.device)
                numbers["fid"] = round(fid(metric, self.run, drawn, files), 4)
                if note := fid_note(len(drawn)):
                    numbers["notes"] = [note]
            except (ImportError, CheckpointError) as error:
                numbers["notes"] = [
                    f"FID is not computed ({first_line(error)}): it needs the Inception weights and "
                    f"{install_hint('torchmetrics', 'torch_fidelity')}."
                ]
        return results, numbers
