"""Training of the language model: the library's, for checkpoints of this family."""

from seed_multimodal.training.llm.task import LlmTask


class MosaicTask(LlmTask):
    """Trains on texts and codes."""

    family = "mosaic"
