"""What the library needs to know of the family; without torch."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from seed_multimodal.disk import JsonObject, read_json_object
from seed_multimodal.errors import ConfigError
from seed_multimodal.language.prompts import TaskPrompts
from seed_multimodal.models.registry import Abilities, FamilySpec
from seed_multimodal.pipelines.config import SystemConfig, part, read_sizes
from seed_multimodal.settings import positive

PIPELINE = "GlmImagePipeline"
INDEX = "model_index.json"
PIXELS = 32  # of a code's side
READ_PIXELS = 16  # of a code's side, as the image tokenizer reads it
LLM = "vision_language_encoder"
# A request is the text alone.
TASKS = TaskPrompts(draw="{caption}", draw_response="", edit_response="")


@dataclass(kw_only=True)
class GlmImageConfig(SystemConfig):
    """Parts of a GLM-Image: the sub-folders of its diffusers folder, which is its decoder, too."""

    system = "seed_glm_image"  # transformers has a model glm_image
    abilities = Abilities(reads_codes=False, codes_are_rows=False, writes=False, converses=False)

    llm: Path | None = part("language model", "llm", flag="language model", required=True)
    tokenizer: Path | None = part("processor", "processor", flag="processor", required=True)
    encoder: Path | None = part(
        "image tokenizer", LLM, flag="folder with the image tokenizer; default: a whole --llm"
    )
    decoder: Path | None = part(
        "decoder", "decoder", flag="diffusers folder with the transformer", draws=True
    )
    side: int = positive(1024)  # pixels of a square drawing; of images in training, too
    tasks: TaskPrompts = TASKS

    def check(self, label: str) -> None:
        if self.side % PIXELS:
            raise ConfigError(f"{label}: side must be a multiple of {PIXELS} pixels.")

    @classmethod
    def recognise(cls, folder: Path) -> Self | None:
        """The original's folder."""
        file = folder / INDEX
        if not file.is_file() or read_json_object(file).get("_class_name") != PIPELINE:
            return None
        llm = folder / LLM
        return cls(llm=llm, tokenizer=folder / "processor", encoder=llm, decoder=folder)

    @classmethod
    def base_system(cls, paths: Mapping[str, Path], checkpoint: Path) -> Self:
        for path in paths.values():
            config = cls.recognise(path.parent)
            if config is not None:
                return config
        return cls()

    @classmethod
    def settings_of_weights(cls, paths: dict[str, Path]) -> JsonObject:
        """A trained language model alone has no image tokenizer."""
        if "encoder" not in paths and "vision_config" not in read_sizes(paths["llm"]):
            raise ConfigError(f"{paths['llm']}: has no image tokenizer: give --encoder, too.")
        return {}

    def parts_to_save(self) -> dict[str, Path]:
        """One copy of a folder that is language model and image tokenizer."""
        paths = super().parts_to_save()
        if paths.get("encoder") == paths.get("llm"):
            paths.pop("encoder", None)
        return paths

    @classmethod
    def arrange(cls, folder: Path, names: dict[str, str | None]) -> None:
        names["encoder"] = names.get("encoder") or names["llm"]
        for name in (LLM, "processor"):  # of the original's folder
            shutil.rmtree(folder / "decoder" / name, ignore_errors=True)


SPEC = FamilySpec.read(GlmImageConfig, Path(__file__).parent)
