"""Settings of `seed eval tokenizer` and `seed eval prefix`; without torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from seed_multimodal.config import load_yaml
from seed_multimodal.data.formats.contents import registered_formats
from seed_multimodal.disk import JsonObject
from seed_multimodal.settings import non_negative, positive, setting

DATA = (
    "a folder of images (captions in .txt), a list (.json, .jsonl, .parquet), a pattern of .tar "
    "shards, a registered format (nano), or a .yaml file"
)


@dataclass(kw_only=True)
class MeasuredImages:
    """The images that are measured, and what measures them."""

    data: str = setting(help=DATA)
    limit: int | None = positive(None, help="look at LIMIT images, drawn by --seed")
    split: str | None = setting(None, help="of a registered format (default: val)")
    image_root: str | None = setting(None, help="folder of the images that a list names")
    image_key: str | None = setting(None, help="field of a list with the image")
    caption_key: str | None = setting(None, help="field of a list with the captions")
    captioned: bool | None = setting(None, flag="--no-captions", const=False, help="images alone")
    clip: str | None = setting(
        None, help="CLIP vision encoder of the target embedding (none: without)"
    )
    batch: int = positive(64, flag="--batch-size", help="images at a time (default: 64)")
    seed: int = non_negative(0, help="of the images that are drawn, and of drawings")
    device: str = "auto"
    dtype: str = "auto"

    def pairs(self) -> JsonObject:
        """What `data.formats.pairs.open_pairs` reads."""
        # 1. A configuration, a registered format, or files.
        spec: JsonObject = {"format": "auto", "files": self.data, "split": self.split}
        if Path(self.data).suffix in (".yaml", ".yml"):
            spec = {str(key): value for key, value in load_yaml(self.data).items()}
        elif self.data in registered_formats():
            spec = {"format": self.data, "split": self.split or "val"}

        # 2. The keys of a record.
        for name in ("image_root", "image_key", "caption_key", "captioned"):
            spec[name] = getattr(self, name)
        return {key: value for key, value in spec.items() if value is not None}


@dataclass(kw_only=True)
class TokenizerSettings(MeasuredImages):
    """The tokenizer, the models for the measures, and how much is measured."""

    model: str = setting("pretrained/nano", help="system or tokenizer folder (default: nano)")
    out: str = setting(help="folder of report.json, evaluate.txt and the sheet")
    stage1: str | None = setting(None, help="stage-1 checkpoint: its text path for retrieval")
    clip_text: str | None = setting(None, help="CLIP text encoder of the same space")
    text_tokenizer: str | None = setting(None, help="word pieces of stage 1")
    decoder: str | None = setting(
        None, help="diffusers folder that rebuilds images (none: without)"
    )
    rebuild: int = non_negative(128, help="rebuild so many images (default: 128)")


@dataclass(kw_only=True)
class PrefixSettings(MeasuredImages):
    """The tokenizers, and the images that train the probe."""

    model: list[str] = setting(
        factory=lambda: ["pretrained/nano"],
        help="systems or tokenizer folders; the first one's codes also shuffled (default: nano)",
    )
    out: str = setting(help="folder of prefix.json, prefix.md, curves.png and sheet.png")
    judge: str | None = setting(
        None, help="registered reward, NAME or NAME:MODEL, that scores drawings by labels (nano)"
    )
    probe: str | None = setting(
        None, help="labelled images that train a linear probe, as --data (nano: its split train)"
    )
    probe_images: int = positive(2000, help="so many of them (default: 2000)")

    def probe_pairs(self) -> JsonObject:
        """The same of the images of the probe."""
        assert self.probe is not None
        split = "train" if self.probe in registered_formats() else None
        return replace(self, data=self.probe, split=split).pairs()
