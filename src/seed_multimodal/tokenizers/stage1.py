"""Stage 1: the causal Q-Former learns, by contrast with captions, to put an image into 32 ordered queries.

Only the last query (the one that sees all others) is compared with the caption's first token. Parameter names are the
released training checkpoint's, so `Stage2Model.load_stage1` and `Seed2Tokenizer` take them by name.
The contrast (both projections and the logits) is computed in fp32 under autocast too: divided by a temperature of 0.07,
bf16 products alone put several per cent of error into the gradient (a test measures it against fp64).
Note: features gathered from other processes carry no gradient, and with a process group of any size this holds
for a process's own features too (`gather_gradient` changes it). Text comes as ids: any tokenizer will do.
Ours, off by default: `embedding_dim` adds a head that regresses an image embedding from the first k queries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from seed_multimodal.errors import ConfigError
from seed_multimodal.nn.eva import EvaVit
from seed_multimodal.nn.layers import LayerNorm
from seed_multimodal.tokenizers.contrast import gather_rows, similarities, unit_rows
from seed_multimodal.tokenizers.qformer import QFormer
from seed_multimodal.tokenizers.seed2 import Seed2Config


@dataclass
class Stage1Output:
    """Losses `[]`, logits `[B, B · processes]` (already divided by the temperature) and normalised features."""

    loss: Tensor
    loss_itc: Tensor
    loss_embedding: Tensor | None
    sim_i2t: Tensor
    sim_t2i: Tensor
    targets: Tensor
    query_output: Tensor
    query_feats: Tensor
    text_feats: Tensor


class Stage1Model(nn.Module):
    """Frozen vision tower, trainable `ln_vision` and Q-Former with its text path.

    Args:
        config: sizes; only `vit`, `qformer` and `num_query` matter here.
        vocab_size: word pieces of the text tokenizer (released: BERT's 30522 and `[DEC]`).
        embed_dim: width of the space in which image and text are compared.
        temperature: start of the learned divisor of the similarities.
        lm_head: keep BERT's prediction head: unused and frozen, but part of the released checkpoint.
        freeze_vit: no gradient into the tower, which then stays in eval mode.
        gather_gradient: None as released (none if a process group exists, full without one), True or False always.
        embedding_dim: if set, `embedding_head` predicts a target image embedding of this width.
    """

    def __init__(self, config: Seed2Config, *, vocab_size: int = 30523, embed_dim: int = 256,
                 temperature: float = 0.07, label_smoothing: float = 0.1, lm_head: bool = True,
                 freeze_vit: bool = True, gather_gradient: bool | None = None, embedding_dim: int | None = None,
                 embedding_weight: float = 1.0) -> None:
        super().__init__()
        width = config.qformer.width
        self.config, self.label_smoothing, self.freeze_vit = config, label_smoothing, freeze_vit
        self.gather_gradient, self.embedding_weight = gather_gradient, embedding_weight
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query, width).normal_(std=0.02))
        self.temp = nn.Parameter(torch.tensor(float(temperature)))
        self.visual_encoder = EvaVit(config.vit)
        self.ln_vision = LayerNorm(config.vit.width)
        self.Qformer = QFormer(config.qformer, config.vit.width, vocab_size, lm_head)
        self.Qformer.copy_text_to_query()
        self.text_proj = nn.Linear(width, embed_dim)
        self.vision_proj = nn.Linear(width, embed_dim)
        self.embedding_head = (nn.Linear(config.num_query * width, embedding_dim)
                               if embedding_dim is not None else None)
        if lm_head:
            _freeze_predictions(self.Qformer)
        if freeze_vit:
            self.visual_encoder.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> Stage1Model:
        """As usual, except that a frozen vision tower stays in eval mode."""
        super().train(mode)
        if self.freeze_vit:
            self.visual_encoder.eval()
        return self

    def vit_features(self, images: Tensor | None) -> Tensor:
        """Pixels `[B, 3, S, S]` → tower output `[B, N, W]`; can be computed once and given to `forward`."""
        if images is None:
            raise ConfigError("Stage 1 needs images, or vit_features computed from them.")
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_vit):
            return self.visual_encoder(images)

    def query_features(self, vit_BNW: Tensor) -> Tensor:
        """Tower output `[B, N, W]` → Q-Former output `[B, 32, D]`."""
        queries = self.query_tokens.expand(len(vit_BNW), -1, -1)
        return self.Qformer(queries, self.ln_vision(vit_BNW))

    def text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Word pieces `[B, T]` (first one `[CLS]`) → normalised features `[B, embed_dim]`."""
        hidden = self.Qformer(input_ids=input_ids, attention_mask=attention_mask)
        return unit_rows(self.text_proj, hidden[:, 0])

    def predict_embedding(self, query_BQD: Tensor, keep: Tensor | None = None) -> Tensor:
        """First `keep` `[B]` queries of each image (default all) → image embedding `[B, embedding_dim]`."""
        if self.embedding_head is None:
            raise ConfigError("This stage-1 model was built without embedding_dim: it predicts no image embedding.")
        if keep is not None:
            places = torch.arange(query_BQD.shape[1], device=query_BQD.device)
            query_BQD = query_BQD * (places < keep[:, None])[..., None]
        return self.embedding_head(query_BQD.flatten(1))

    def forward(self, images: Tensor | None, input_ids: Tensor, attention_mask: Tensor | None = None, *,
                vit_features: Tensor | None = None, target_embedding: Tensor | None = None,
                generator: torch.Generator | None = None) -> Stage1Output:
        """Contrastive loss of a batch of pairs, plus the embedding loss if a target is given.

        Args:
            images: normalised pixels `[B, 3, S, S]`, or None with `vit_features` `[B, N, W]` (before `ln_vision`).
            input_ids: `[B, T]`; `attention_mask` `[B, T]` with 0 for padding.
            target_embedding: `[B, embedding_dim]`. In training each image shows only its first k queries, k uniform
                in 1..32 (drawn from `generator`), so that early codes carry the most.
        """
        vit = self.vit_features(images) if vit_features is None else vit_features
        query_output = self.query_features(vit)
        query_feats = unit_rows(self.vision_proj, query_output)
        text_feats = self.text_features(input_ids, attention_mask)
        image_feats = query_feats[:, -1]
        sim_i2t = similarities(image_feats, self._gather(text_feats)) / self.temp
        sim_t2i = similarities(text_feats, self._gather(image_feats)) / self.temp
        rank = dist.get_rank() if _has_group() else 0
        targets = rank * len(image_feats) + torch.arange(len(image_feats), device=sim_i2t.device)
        loss_itc = (F.cross_entropy(sim_i2t, targets, label_smoothing=self.label_smoothing)
                    + F.cross_entropy(sim_t2i, targets, label_smoothing=self.label_smoothing)) / 2
        loss, loss_embedding = loss_itc, None
        if target_embedding is not None:
            loss_embedding = self._embedding_loss(query_output, target_embedding, generator)
            loss = loss + self.embedding_weight * loss_embedding
        return Stage1Output(loss, loss_itc, loss_embedding, sim_i2t, sim_t2i, targets, query_output, query_feats,
                            text_feats)

    def _embedding_loss(self, query_BQD: Tensor, target: Tensor, generator: torch.Generator | None) -> Tensor:
        keep = None
        if self.training:
            device = query_BQD.device if generator is None else generator.device
            keep = torch.randint(1, query_BQD.shape[1] + 1, (len(query_BQD),), generator=generator, device=device)
            keep = keep.to(query_BQD.device)
        predicted = self.predict_embedding(query_BQD, keep)
        return F.mse_loss(predicted.float(), target.float())

    def _gather(self, features: Tensor) -> Tensor:
        """Features of all processes in rank order `[B · processes, E]`."""
        with_gradient = not _has_group() if self.gather_gradient is None else self.gather_gradient
        shown = features if with_gradient else features.detach()
        return gather_rows(shown) if _has_group() else shown


def _has_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def _freeze_predictions(qformer: QFormer) -> None:
    """Freeze the unused head; its decoder shares the word embeddings, which stay trainable."""
    for name, parameter in qformer.named_parameters():
        if "cls.predictions" in name:
            parameter.requires_grad_(False)
