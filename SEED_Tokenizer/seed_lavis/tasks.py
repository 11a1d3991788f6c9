"""Tasks: LAVIS's own `image_text_pretrain`, and the original's clone of it under another name."""

from __future__ import annotations

from seed_lavis.compat import ImageTextPretrainTask, registry


@registry.register_task("image_gen_pretrain")
class ImageGenPretrainTask(ImageTextPretrainTask):
    """`image_text_pretrain` by another name, which some of the original's files use."""
