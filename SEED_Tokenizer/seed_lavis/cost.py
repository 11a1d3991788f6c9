"""Cost of a picture in a run: operations of one step, and the peak of the device."""

from __future__ import annotations

from typing import Any

import torch

from seed_lavis.context import RunContext
from seed_multimodal.peaks import known_peak
from seed_multimodal.tokenizers.flops import lavit_stage1_flops, stage1_flops, stage2_flops, text_flops, vision_flops
from seed_multimodal.tokenizers.qformer import QFormerConfig
from seed_multimodal.training.loop_settings import SampleCost
from seed_multimodal.vision.eva import EvaConfig

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def sample_cost(run: RunContext) -> SampleCost:
    """Of the run's model; `run.peak_tflops` before the data sheet's peak, which is that of the run's precision."""
    options = run.options
    peak = options.peak_tflops if options.peak_tflops else known_peak(run.device, DTYPES[run.precision])
    return SampleCost(float(step_flops(run.model, options.batch_size_train * run.world)), peak)


def step_flops(model: Any, pairs: int) -> int:
    """Operations of one picture through one step: the model, forward and backward, and frozen towers beside it.

    Captions count as if all were as long as they may be.
    """
    options = model.options
    if model.stage == "lavit-stage1":
        # A frozen selector is frozen once there are codes: until then a step is more than this.
        return lavit_stage1_flops(model.config.tokenizer, model.config.decoder, freeze_selector=model.freeze_selector)
    clip, text = (getattr(model, name, None) for name in ("clip", "text_encoder"))
    clip = getattr(model, "clip_model", None) if clip is None else clip
    target = 0 if clip is None or model.shares_tower else vision_flops(clip_sizes(clip))
    target += 0 if text is None else text_flops(text_sizes(text), model.config.text_tokens)
    if model.stage == "stage1":
        return target + stage1_flops(model.config, words=options.max_txt_len, pairs=pairs, embed_dim=options.embed_dim,
                                     freeze_vit=options.freeze_vit,
                                     embedding_dim=getattr(model.embedding_head, "out_features", None))
    return target + stage2_flops(model.config, freeze_qformer=options.freeze_qformer)


def clip_sizes(clip: Any) -> EvaConfig:
    """The sizes of a transformers CLIP vision tower; it is a ViT as EVA is."""
    sizes = clip.config
    return EvaConfig(image_size=sizes.image_size, patch_size=sizes.patch_size, width=sizes.hidden_size,
                     depth=sizes.num_hidden_layers, heads=sizes.num_attention_heads, mlp_width=sizes.intermediate_size)


def text_sizes(tower: Any) -> QFormerConfig:
    """The sizes of a transformers CLIP text tower; it is a BERT without cross-attention."""
    sizes = tower.config
    return QFormerConfig(width=sizes.hidden_size, depth=sizes.num_hidden_layers, heads=sizes.num_attention_heads,
                         mlp_width=sizes.intermediate_size)
