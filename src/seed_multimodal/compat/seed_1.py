"""SEED-1's tokenizer with the original name and arguments (branch `v1` of AILab-CVC/SEED)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from seed_multimodal.models.seed.modeling import Seed1Tokenizer
from seed_multimodal.weights.find import locate_or_same

FOLDER = "pretrained"  # of causal_qformer.pth, seed_tokenizer.pth and eva_vit_g.pth


class SEEDVisualTokenizer(nn.Module):
    """`models.visual_tokenizer.SEEDVisualTokenizer`, with the weights in `pretrained/`."""

    def __init__(
        self,
        img_size: int = 224,
        drop_path_rate: float = 0,
        use_grad_checkpoint: bool = False,
        vit_precision: str = "fp16",
        num_query_token: int = 32,
        max_txt_len: int = 32,
        folder: str = FOLDER,
    ) -> None:
        """`folder` is ours; the originals' arguments have no effect, because the weights determine
        their sizes.

        Raises:
            CheckpointError: missing (with download instructions) or damaged weights.
        """
        super().__init__()
        self.model = Seed1Tokenizer.from_pretrained(locate_or_same(folder))

    @torch.no_grad()
    def predict(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised pixels `[B, 3, 224, 224]` → codes `[B, 32]` and the embeddings `[B, 77, 768]`
        that replace Stable Diffusion's text embeddings."""
        codes = self.model.encode(image)
        return codes, self.model.decode(codes)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """As `predict`."""
        return self.predict(image)
