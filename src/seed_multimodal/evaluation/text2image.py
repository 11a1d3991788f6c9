"""Drawings of captions: the best of several by CLIP, and FID to the captioned images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from seed_multimodal.disk import JsonObject, text_stem
from seed_multimodal.errors import CheckpointError, DataError, first_line, install_hint
from seed_multimodal.evaluation.annotations import Sample, read_captions
from seed_multimodal.evaluation.benchmark import Images, Line, Scores
from seed_multimodal.evaluation.captions import CaptionFile
from seed_multimodal.images.io import save_image
from seed_multimodal.settings import positive, setting

if TYPE_CHECKING:
    from seed_multimodal.evaluation.clip import Clip

BUILT_IN = Path("built in")  # instead of a file: the captions of the original program
CAPTIONS = (
    "A small wooden house on a snowy hill in the evening",
    "A lighthouse at the sea in a storm, oil painting",
    "Three sailing boats on a calm lake at sunrise",
    "The word HELLO written in the sand of a beach",
)
CLIP_FOLDER = Path("pretrained/clip-vit-large-patch14")
# Below about the number of Inception's features (2,048) the covariance is singular.
FID_IMAGES = 2000


def find_clip(
    path: Path | None,
    purpose: str = "to select the best of several images",
    alternative: str = "generate one image per text (--best-of 1)",
) -> Path:
    """The CLIP folder, or OpenAI's file.

    path: None for the default. purpose, alternative: of the message about a missing one.
    Raises CheckpointError: missing.
    """
    clip = path or CLIP_FOLDER
    if not clip.exists():
        raise CheckpointError(
            f"{clip}: no CLIP {purpose}; put openai/{CLIP_FOLDER.name} of the Hugging Face hub "
            f"there, set --clip, or {alternative}."
        )
    return clip


@dataclass(kw_only=True)
class Drawings(CaptionFile):
    """Drawings of captions; file names count the samples.

    original: .jpg files as by the original script, with negative conditioning on SEED-LLaMA's
        captionless image; images are not compared.
    """

    title = "the best of several drawings by CLIP: FID"
    kind = options_of = "text2image"
    draws = True

    best_of: int | None = positive(None, help="drawings, of which CLIP keeps one (default: 4 or 1)")
    clip: Path | None = setting(None, metavar="DIR", help="CLIP folder of transformers")
    resolution: int = positive(512, may_change=True, help="of real images for FID (default: 512)")
    inception: Path | None = setting(
        None, may_change=True, metavar="FILE", help="weights of FID's network"
    )
    original: bool = False

    def __post_init__(self) -> None:
        # Several drawings need CLIP, which selects the best one.
        if self.best_of is None:
            self.best_of = 4 if self.clip or CLIP_FOLDER.is_dir() else 1
        self.clip = find_clip(self.clip) if self.best_of > 1 or self.clip else None
        self.scorer: Clip | None = None

    def samples(self) -> list[Sample]:
        if self.file == BUILT_IN:
            return [
                Sample(index, f"caption {index}", references=[text])
                for index, text in enumerate(CAPTIONS, 1)
            ]
        samples = read_captions(self.file, self.split, each_text=True)
        if self.original:
            samples = [replace(sample, image=None) for sample in samples]
        return samples

    def prepare(self, samples: Sequence[Sample]) -> None:
        if self.clip is not None:
            from seed_multimodal.evaluation.clip import Clip

            self.scorer = Clip(self.clip, self.system.images.device)

    def is_current(self, sample: Sample, line: Line) -> bool:
        return "image" not in line or (self.out / line["image"]).is_file()

    def answer(self, samples: Sequence[Sample], images: Images) -> list[Line]:
        """Generate, select and save the images of a batch."""
        # 1. `best_of` images of each caption.
        candidates = self.draw(samples, self.best_of or 1)

        # 2. The best of each by CLIP, as INDEX_CAPTION.png; the original's are JPEG.
        lines: list[Line] = []
        for sample, image, drawings in zip(samples, images, candidates, strict=True):
            best = drawings[0]
            scores: JsonObject = {}
            if self.scorer is not None:
                features = self.scorer.images(drawings)
                cosines = features @ self.scorer.texts([sample.caption])[0]
                index = int(cosines.argmax())
                best = drawings[index]
                scores["clip"] = round(float(cosines[index]), 4)
                if image is not None:
                    cosine = float(features[index] @ self.scorer.images([image])[0])
                    scores["clip_image"] = round(cosine, 4)
            suffix = "jpg" if self.original else "png"
            path = self.out / f"{sample.index:06d}_{text_stem(sample.caption)}.{suffix}"
            save_image(best, path, DataError)
            lines.append({"caption": sample.caption, "image": path.name, **scores})
        return lines

    def score(self, samples: Sequence[Sample], lines: Sequence[Line]) -> Scores:
        """File names of the images; their mean CLIP cosine, and FID if all captions have images."""
        # 1. Results of the captions that were drawn.
        drawn = [pair for pair in zip(samples, lines, strict=True) if "image" in pair[1]]
        results = [
            {"id": sample.key, "caption": line["caption"], "image": line["image"]}
            for sample, line in drawn
        ]
        scores = Scores(results, {})

        # 2. Scores; texts without images have no FID.
        for name in ("clip", "clip_image"):
            cosines = [line[name] for _, line in drawn if name in line]
            if cosines:
                scores.values[name] = round(sum(cosines) / len(cosines), 4)
        if len(drawn) > 1 and all(sample.image is not None for sample, _ in drawn):
            self._add_fid(scores, [sample for sample, _ in drawn])
        return scores

    def _add_fid(self, scores: Scores, samples: Sequence[Sample]) -> None:
        """Add FID, or a note why there is none."""
        from seed_multimodal.evaluation.fid import fid, fid_metric

        # Its packages and weights are optional.
        files = [self.out / result["image"] for result in scores.results]
        try:
            metric = fid_metric(self.inception).to(self.system.images.device)
        except (ImportError, CheckpointError) as error:
            hint = install_hint("torchmetrics", "torch_fidelity")
            reason = f"({first_line(error)}): it needs the Inception weights and {hint}."
            scores.notes.append(f"FID is not computed {reason}")
            return
        real = filter(None, map(self.open_image, samples))
        scores.values["fid"] = round(fid(metric, real, files, self.resolution), 4)
        if len(samples) < FID_IMAGES:
            scores.notes.append(
                f"FID of {len(samples):,} images is biased and not comparable with that of other "
                f"numbers: its covariance needs {FID_IMAGES:,} or more."
            )


@dataclass(kw_only=True)
class OriginalDrawings(CaptionFile):
    """The flags of the original program, which has captions of its own."""

    file: str | Path = setting(
        BUILT_IN, flag="--captions", metavar="FILE", help="as of seed eval text2image"
    )
