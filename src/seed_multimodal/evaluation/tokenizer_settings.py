"""Settings of `seed eval tokenizer`; without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from seed_multimodal.config import load_yaml
from seed_multimodal.data.formats.contents import registered_formats
from seed_multimodal.disk import JsonObject
from seed_multimodal.settings import setting


@dataclass(kw_only=True)
class TokenizerSettings:
    """The tokenizer, the images, the models for the measures, and how much is measured."""

    model: str = setting("pretrained/nano", help="system or tokenizer folder (default: nano)")
    data: str = setting(
        help="a folder of images (captions in .txt), a list (.json, .jsonl, .parquet), a pattern "
        "of .tar shards, a registered format (nano), or a .yaml file"
    )
    out: str = setting(help="folder of report.json, evaluate.txt and the sheet")
    stage1: str | None = setting(None, help="stage-1 checkpoint: its text path for retrieval")
    limit: int | None = setting(None, minimum=1, help="look at LIMIT images, drawn by --seed")
    split: str | None = setting(None, help="of a registered format (default: val)")
    image_root: str | None = setting(None, help="folder of the images that a list names")
    image_key: str | None = setting(None, help="field of a list with the image")
    caption_key: str | None = setting(None, help="field of a list with the captions")
    captioned: bool | None = setting(None, flag="--no-captions", const=False, help="images alone")
    clip: str | None = setting(
        None, help="CLIP vision encoder of the target embedding (none: without)"
    )
    clip_text: str | None = setting(None, help="CLIP text encoder of the same space")
    text_tokenizer: str | None = setting(None, help="word pieces of stage 1")
    decoder: str | None = setting(
        None, help="diffusers folder that rebuilds images (none: without)"
    )
    rebuild: int = setting(128, minimum=0, help="rebuild so many images (default: 128)")
    batch: int = setting(64, minimum=1, flag="--batch-size", help="images at a time (default: 64)")
    seed: int = setting(0, minimum=0, help="of the images that are drawn, and of drawings")
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
