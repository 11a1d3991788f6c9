"""What the library needs to know of the family; without torch."""

from dataclasses import dataclass
from pathlib import Path

from seed_multimodal.models.registry import FamilySpec, PageCards, Training
from seed_multimodal.pipelines.config import CodeSystemConfig


@dataclass(kw_only=True)
class MosaicConfig(CodeSystemConfig):
    """Parts and settings of a mosaic system."""

    system = "mosaic"

    tile: int = 4  # pixels a side of a drawn tile


SPEC = FamilySpec(
    title="Mosaic",
    config=MosaicConfig,
    family="mosaic.pipeline:MosaicFamily",
    images="mosaic.pipeline:load_images",
    trainings={"train_mosaic": Training("train", "mosaic.train:MosaicTask")},
    evaluation={"caption": {"max_new_tokens": 4}},
    starts=Path(__file__).with_name("starts.yaml"),
    cards=PageCards.read(Path(__file__).with_name("cards.yaml")),
)
