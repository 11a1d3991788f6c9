"""SEED-LLaMA as a family: parts, settings, the original 8B and 14B, how its folders look."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from seed_multimodal.disk import JsonObject
from seed_multimodal.language.prompts import template_for
from seed_multimodal.models.registry import Abilities, FamilySpec
from seed_multimodal.pipelines.config import CodeSystemConfig, part, read_sizes
from seed_multimodal.settings import check_keys, positive
from seed_multimodal.weights.catalogue import WEIGHT_SUFFIXES, catalogue
from seed_multimodal.weights.find import locate

DETOKENIZER_FOLDER = "diffusion_model"  # of a tokenizer's folder
# Preprocessing of the original SEED-LLaMA.
BILINEAR = {"type": "clip", "keep_ratio": False, "interpolation": "bilinear"}
# Of a tokenizer without language model, as in its evaluation.
BICUBIC = {**BILINEAR, "interpolation": "bicubic"}


@dataclass(kw_only=True)
class SeedLlamaConfig(CodeSystemConfig):
    """Parts and settings of a SEED-LLaMA, or of an image tokenizer alone."""

    system = "seed_llama"
    abilities = Abilities(first_codes=True)
    shipped = "nano"
    llm: Path | None = part("language model", "seed_llama", flag="language model")
    tokenizer: Path | None = part(
        "image tokenizer",
        "seed_tokenizer",
        flag="folder that seed export-tokenizer made, with words",
        required=True,
    )
    detokenizer: Path | None = part(
        "diffusion model",
        f"seed_tokenizer/{DETOKENIZER_FOLDER}",
        flag="diffusion folder: stable-unCLIP's or a trained decoder; default: the tokenizer's "
        "diffusion_model",
        draws=True,
    )
    vision: Path | None = part("vision encoder")
    image_size: int | None = positive(224)  # pixels a side that the tokenizer reads
    # keywords of `get_transform`
    transform: JsonObject = field(default_factory=lambda: dict(BILINEAR))

    def check(self, label: str) -> None:
        from seed_multimodal.images.transforms import get_transform

        transform_keys = inspect.signature(get_transform).parameters
        check_keys(self.transform, transform_keys, f"{label}: transform")
        self.transform = {**BILINEAR, **self.transform}

    def override(self, **values: Any) -> None:
        super().override(**values)
        # An original tokenizer's folder may have its own copy of the diffusion model.
        if self.found.original and self.tokenizer and "detokenizer" not in values:
            copy = locate(self.tokenizer / DETOKENIZER_FOLDER)
            self.detokenizer = copy or self.detokenizer

    @classmethod
    def recognise(cls, folder: Path) -> Self | None:
        """An image tokenizer, or a language model whose other parts are the original's."""
        sizes = read_sizes(folder)
        names = ("seed_quantizer", "causal_qformer")
        has_original_files = any(any(folder.glob(f"{name}.*")) for name in names)
        is_tokenizer = sizes.get("model_type") in ("seed2_tokenizer", "seed1_tokenizer")
        if is_tokenizer or has_original_files or folder.suffix in WEIGHT_SUFFIXES:
            parent = folder.parent if folder.is_file() else folder
            unclip = Path(catalogue().parts["unclip"].folder)
            return cls(
                tokenizer=folder,
                detokenizer=locate(parent / DETOKENIZER_FOLDER) or locate(unclip),
                image_size=None,
                transform=dict(BICUBIC),
            )
        if not sizes:
            return None
        config = cls.of_original("8b")
        config.llm = folder
        note = (
            f"is a language model alone. A system of it: seed assemble seed-llama --llm {folder} "
            f"--tokenizer TOKENIZER --out SYSTEM; to train one: seed init --llm {folder} OUT. "
            "With the original image tokenizer: "
        )
        config.found = replace(config.found, note=note)
        config.template = template_for(sizes.get("hidden_size"))
        return config

    @classmethod
    def base_system(cls, paths: Mapping[str, Path], checkpoint: Path) -> Self:
        config = cls.of_original("8b")
        sizes = read_sizes(paths.get("llm", checkpoint))
        if sizes:
            config.template = template_for(
                sizes.get("hidden_size"), paths.get("tokenizer", config.tokenizer)
            )
        return config

    @classmethod
    def settings_of_weights(cls, paths: dict[str, Path]) -> JsonObject:
        """The template of a 14B differs; preprocessing is that of the tokenizer's training."""
        llm_sizes = read_sizes(paths.get("llm"))
        vit = read_sizes(paths.get("tokenizer")).get("vit", {})
        return {
            "template": template_for(llm_sizes.get("hidden_size"), paths.get("tokenizer")),
            "transform": dict(BICUBIC),
            "image_size": vit.get("preprocessing", vit).get("image_size", 224),
        }

    @classmethod
    def arrange(cls, folder: Path, names: dict[str, str | None]) -> None:
        # The tokenizer's folder may hold the diffusion model.
        if names["detokenizer"] is None and (folder / "tokenizer" / DETOKENIZER_FOLDER).is_dir():
            names["detokenizer"] = f"tokenizer/{DETOKENIZER_FOLDER}"
        # The vision encoder of SEED-2 is a file.
        files = [*(folder / "vision").glob("*")]
        if len(files) == 1:
            names["vision"] = f"vision/{files[0].name}"

    def parts_to_save(self) -> dict[str, Path]:
        parts = super().parts_to_save()
        # The tokenizer's folder is copied with the diffusion model in it.
        detokenizer = parts.get("detokenizer")
        if detokenizer is not None and detokenizer.parent == parts["tokenizer"]:
            del parts["detokenizer"]
        return parts


SPEC = FamilySpec.read(SeedLlamaConfig, Path(__file__).parent)
