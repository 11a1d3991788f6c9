"""LaVIT as a family: parts, settings, the original model, how its folders look."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from seed_multimodal.disk import JsonObject
from seed_multimodal.errors import ConfigError
from seed_multimodal.language.prompts import TaskPrompts
from seed_multimodal.models.registry import Abilities, FamilySpec
from seed_multimodal.pipelines.config import SystemConfig, part, read_sizes
from seed_multimodal.weights.catalogue import VISUAL_WEIGHTS, catalogue

_ORIGINAL = catalogue().parts["lavit"].folder
# It continues images and texts; only questions have a template.
TASKS = TaskPrompts(
    describe="",
    qa_prefix="Question: ",
    qa_suffix=" Answer:",
    draw="{caption}",
    draw_response="",
    edit_response="",
)


@dataclass(kw_only=True)
class LavitConfig(SystemConfig):
    """Parts and settings of a LaVIT; of an original, `decoder` is a file."""

    system = "lavit"
    abilities = Abilities(reads_codes=False, converses=False)
    shipped = "nano-lavit"
    model_flags = "LaVIT's evaluate.py: --model_path; the server"
    trained_parts = ("llm", "words")

    llm: Path | None = part("language model", "llm", flag="checkpoint of stage 2")
    words: Path | None = part(
        "text tokenizer",
        flag="text tokenizer; default: in the language model's folder",
        optional=True,
    )
    tokenizer: Path | None = part(
        "dynamic tokenizer",
        "tokenizer",
        flag="what seed export-tokenizer --lavit made, with its decoder",
        required=True,
    )
    decoder: Path | None = part(
        "decoder of codes",
        "decoder",
        flag="decoder of codes; default: the one trained with the pixels, else the tokenizer's",
        draws=True,
    )
    pixels: Path | None = part(
        "pixel decoder (unet, vae and scheduler)",
        "pixels",
        flag="result of the pixel decoder's training, OUTPUT_DIR/pixels",
        draws=True,
    )
    safety: Path | None = part("safety checker", optional=True)
    head: Literal["highres", "lowres"] = "highres"  # which of LaVIT's pixel decoders
    # of tokens: by their probability, or those above 0.5
    selection: Literal["draw", "threshold"] = "draw"
    generation: dict[str, JsonObject] = field(default_factory=dict)  # by task
    tasks: TaskPrompts = TASKS

    def override(self, **values: Any) -> None:
        # The original's pixel decoders are next to each other.
        if self.found.original and values.get("head") == "lowres":
            for key in ("decoder", "pixels"):
                path: Path = getattr(self, key)
                setattr(self, key, path.with_name(path.name.removeprefix("highres_")))
        super().override(**values)

    @classmethod
    def recognise(cls, folder: Path) -> Self | None:
        """A copy of the original repository."""
        if any((folder / name).is_dir() for name in ("visual_tokenizer", "language_model")):
            return cls.of_original("lavit", folder, _ORIGINAL)
        return None

    @classmethod
    def base_system(cls, paths: Mapping[str, Path], checkpoint: Path) -> Self:
        visual = paths.get("tokenizer")
        if read_sizes(visual):
            return cls()  # a tokenizer that is not the original, without pixel decoder
        return cls.of_original("lavit", visual, _ORIGINAL)

    @classmethod
    def settings_of_weights(cls, paths: dict[str, Path]) -> JsonObject:
        """An export holds tokenizer and decoder, a trained pixel decoder its decoder."""
        exported = paths["tokenizer"]
        if "decoder" not in paths:
            decoders = [paths.get("pixels", exported) / "decoder", exported / "decoder"]
            decoders = [decoder for decoder in decoders if decoder.is_dir()]
            if decoders:
                paths["decoder"] = decoders[0]
        if (exported / "tokenizer").is_dir():
            paths["tokenizer"] = exported / "tokenizer"
        return {"head": read_sizes(paths.get("decoder")).get("head", "highres")}

    @classmethod
    def arrange(cls, folder: Path, names: dict[str, str | None]) -> None:
        # A checkpoint of stage 2 holds the tokenizer's second token merger.
        visual_weights = folder / "llm" / VISUAL_WEIGHTS
        if visual_weights.is_file():
            visual_weights.replace(folder / "tokenizer" / VISUAL_WEIGHTS)
        shutil.rmtree(folder / "pixels" / "decoder", ignore_errors=True)  # the part `decoder`

    def parts_to_save(self) -> dict[str, Path]:
        if self.found.original:
            raise ConfigError(
                f"{self.name}: its parts are one folder in the original's layout already; "
                "copy that."
            )
        return super().parts_to_save()


SPEC = FamilySpec.read(LavitConfig, Path(__file__).parent)
