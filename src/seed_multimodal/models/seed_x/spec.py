"""SEED-X as a family: parts, settings, the three original models, how its folders look."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from seed_multimodal.disk import JsonObject
from seed_multimodal.language.prompts import SEED_X_TASKS, TaskPrompts
from seed_multimodal.models.registry import Abilities, FamilySpec
from seed_multimodal.pipelines.config import SystemConfig, part


@dataclass(kw_only=True)
class SeedXConfig(SystemConfig):
    """Parts and settings of a SEED-X."""

    system = "seed_x"
    abilities = Abilities(reads_codes=False, draws_codes=False, detects=True, takes_conditions=True)
    shipped = "nano-x"
    trained_parts = ("agent", "tokenizer")

    agent: Path | None = part(
        "agent (resamplers)",
        "agent",
        flag="resamplers: of a merged agent, or a checkpoint of the tuning",
        required=True,
    )
    tokenizer: Path | None = part("text tokenizer", "tokenizer", flag="words", required=True)
    vision: Path | None = part("vision encoder", "vision", flag="vision encoder", required=True)
    sdxl: Path | None = part(
        "SDXL (unet/config.json, vae and scheduler)",
        "sdxl",
        flag="SDXL's unet/config.json, vae and scheduler",
        draws=True,
    )
    detokenizer: Path | None = part(
        "SDXL adapter", "detokenizer", flag="adapter of either stage", draws=True
    )
    # tile grids of input images
    grids: tuple[str, ...] = ("1x1", "1x2", "1x3", "2x1", "3x1", "1x4", "4x1", "2x2")
    edit_grids: tuple[str, ...] = ("1x1",)
    generation: JsonObject = field(
        default_factory=lambda: {"max_new_tokens": 512, "do_sample": False}
    )
    tasks: TaskPrompts = SEED_X_TASKS

    @classmethod
    def recognise(cls, folder: Path) -> Self | None:
        """A copy of the original repository, or a merged agent."""
        names = ("seed_x", "seed_x_i", "seed_x_edit", "agent")
        if not any((folder / name).is_dir() for name in names):
            return None
        config = cls.of_original("seed-x-i", folder)
        # A merged agent has its language model next to it.
        if (folder / "llm").is_dir():
            config.llm = folder / "llm"
            config.agent = folder / "agent"
            if (config.llm / "tokenizer.model").is_file():
                config.tokenizer = config.llm
        return config

    @classmethod
    def base_system(cls, paths: Mapping[str, Path], checkpoint: Path) -> Self:
        return cls.of_original("seed-x-i")

    @classmethod
    def arrange(cls, folder: Path, names: dict[str, str | None]) -> None:
        # The U-Net's weights are the adapter's.
        for file in (folder / "sdxl" / "unet").glob("*.safetensors"):
            file.unlink()


SPEC = FamilySpec.read(SeedXConfig, Path(__file__).parent)
