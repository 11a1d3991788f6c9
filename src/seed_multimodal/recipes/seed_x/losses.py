"""Training of SEED-X's agent: cross-entropy of tokens, and distance of image features.

Source: SEED-X (arXiv 2404.14396) and its code (`seed_x.py`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from seed_multimodal.language.vocabulary import IGNORE_INDEX
from seed_multimodal.models.seed_x.modeling import AgentSettings, ContinuousLVLM
from seed_multimodal.training.llm.loss import LossParts, head_losses

POOLED = 4  # neighbours that are averaged to one target

# ---- the agent


class TrainedAgent(ContinuousLVLM):
    """The agent with its losses: of tokens, and of output features at the image tokens.

    Both resamplers run in every step, with weight zero if the batch has no image for them, so that
    all processes compute gradients of the same parameters and ZeRO-3 gathers them in the same
    order.
    """

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor,
        image_embeds: Tensor | None,
        embeds_gen_mask: Tensor | None,
        embeds_cmp_mask: Tensor | None,
        ids_gen_mask: Tensor,
        ids_cmp_mask: Tensor,
        patch_positions: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """A batch → `total_loss`, `lm_loss`, `rec_loss`; padding is on the right.

        labels: [B, L], -100 is not learned.
        image_embeds: [N, tokens, K], features of the batch's views, in the order of their tokens.
        embeds_cmp_mask, embeds_gen_mask: bool [N], the views that are input and target; those of
            neither are not used.
        ids_cmp_mask, ids_gen_mask: bool [B, L], the image tokens of input and target views.
        patch_positions: [N, 2], centres of the views.
        position_ids: [B, L], of packed sequences.
        """
        # 1. Embeddings of tokens and input views; without views the resampler runs on zeros.
        input_features = _rows_of(image_embeds, embeds_cmp_mask)
        target_features = _rows_of(image_embeds, embeds_gen_mask)
        positions = _rows_of(patch_positions, embeds_cmp_mask)
        embeds = self.embed(input_ids, ids_cmp_mask, input_features, positions)
        if input_features is None:
            config = self.input_resampler.config
            blank = embeds.new_zeros(1, 1, config.kv_dim or config.embed_dim)
            resampled = self._embed_views(blank, embeds.new_zeros(1, 2))
            embeds = embeds + 0.0 * resampled.sum().to(embeds)

        # 2. States of the language model [B, L, D].
        states: Tensor = self.llm.get_decoder()(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,
        ).last_hidden_state

        # 3. Losses; without target views the resampler runs on any state.
        lm_loss = self.language_loss(states, labels)
        if target_features is None:
            rec_loss = 0.0 * self.output_features(states[:1, :1]).float().sum()
        else:
            rec_loss = self.regression_loss(states[ids_gen_mask], target_features)
        total = self.settings.lm_loss_scale * lm_loss + self.settings.rec_loss_scale * rec_loss
        return {"total_loss": total, "lm_loss": lm_loss, "rec_loss": rec_loss}

    def language_loss(self, states: Tensor, labels: Tensor) -> Tensor:
        """States and labels [B, L] → cross-entropy of each next token; 0 if none is learned."""
        targets = labels[:, 1:]
        # Logits only where something is learned: in a row of SEED-X a tenth or less.
        is_learned = targets != IGNORE_INDEX
        losses = head_losses(self.llm, states[:, :-1][is_learned], targets[is_learned])
        return losses.sum() / is_learned.sum().clamp(min=1)

    def regression_loss(self, states: Tensor, features: Tensor) -> Tensor:
        """States at image tokens [n · 64, D] and features of the images [n, N, K] → distance."""
        target = features.detach().to(states.device)
        if self.settings.vit_down:
            target = F.avg_pool1d(target.transpose(1, 2), POOLED, POOLED).transpose(1, 2)
        target = target.float()
        output = self.output_features(states.unflatten(0, (len(features), -1))).float()
        if self.settings.mse:
            return F.mse_loss(output, target)
        return (1 - F.cosine_similarity(output, target, dim=-1)).mean()


def loss_parts(
    losses: Mapping[str, Tensor],
    settings: AgentSettings,
    *,
    n_tokens: int,
    n_images: int,
    tokens_per_image: float | None,
) -> LossParts:
    """The sums of a micro-batch from the means that `TrainedAgent` returns.

    n_tokens, n_images: learned tokens and target images of the micro-batch.
    tokens_per_image: weight of an image relative to a token; None: both means count once,
        whatever they are means of.
    """
    text_loss = losses["lm_loss"]
    image_loss = losses["rec_loss"]
    text_count = text_loss.new_tensor(float(n_tokens), dtype=torch.float32)
    image_count = text_loss.new_tensor(float(n_images), dtype=torch.float32)

    text_weight: Tensor | float = 1.0
    image_weight: Tensor | float = 1.0
    count = torch.ones_like(text_count)
    if tokens_per_image is not None:
        text_weight = count = text_count
        image_weight = image_count * tokens_per_image
    weighted_text = settings.lm_loss_scale * text_weight * text_loss
    weighted_image = settings.rec_loss_scale * image_weight * image_loss
    return LossParts(
        sum=weighted_text + weighted_image,
        count=count,
        text_sum=text_loss.detach() * text_count,
        text_count=text_count,
        image_sum=image_loss.detach() * image_count,
        image_count=image_count,
    )


def _rows_of(values: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """The rows where the mask is true; None: there are none."""
    if values is None or mask is None or not bool(mask.any()):
        return None
    return values[mask.to(values.device)]
