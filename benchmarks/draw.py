"""Time the de-tokenizer (image embedding → picture) and a whole drawing (text → picture). One JSON line.

    python benchmarks/draw.py --model pretrained/nano                       # the shipped weights
    python benchmarks/draw.py --size released --device cuda --dtype float16    # random SD-2.1-unCLIP, 768 px, 20 steps
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from shared import common_flags, fill_random, guidance, measure, part_of, positive, print_line, runtime_of

from seed_multimodal.detokenizers.unclip import UnclipDetokenizer
from seed_multimodal.device import RELEASED_FP16, Runtime
from seed_multimodal.entry import DONE, guarded

# SD-2.1-unCLIP U-Net + VAE, 768 px, 20 steps, guidance, fp16, stock diffusers on one H200 (2026-11-20).
REFERENCES = {"eager_seconds_batch_1": 0.657, "eager_images_per_second_batch_8": 3.13,
              "compiled_channels_last_seconds_batch_1": 0.334}

RELEASED_UNET = {
    "sample_size": 96, "block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True, "class_embed_type": "projection",
    "projection_class_embeddings_input_dim": 2048}
RELEASED_VAE = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4, "sample_size": 768,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
NANO_UNET = {
    "sample_size": 8, "in_channels": 8, "out_channels": 8, "block_out_channels": (96, 128), "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": 96, "attention_head_dim": 4,
    "class_embed_type": "projection", "projection_class_embeddings_input_dim": 512}
NANO_VAE = {
    "block_out_channels": (16, 32, 64, 128), "layers_per_block": 1, "latent_channels": 8, "norm_num_groups": 8,
    "sample_size": 64, "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}


def random_detokenizer(size: str, device: torch.device, dtype: torch.dtype) -> UnclipDetokenizer:
    """The pipeline of a size with random weights, without text encoder (its empty prompt is a constant)."""
    from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

    from seed_multimodal.detokenizers.unclip_pipeline import SeedUnclipPipeline
    from seed_multimodal.quiet import quiet_loading

    unet_config, vae_config = (RELEASED_UNET, RELEASED_VAE) if size == "released" else (NANO_UNET, NANO_VAE)
    width = unet_config["projection_class_embeddings_input_dim"] // 2
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**unet_config), AutoencoderKL(**vae_config)
    with quiet_loading("diffusers"):
        unet, vae = fill_random(unet, device, dtype), fill_random(vae, device, dtype)
    pipeline = SeedUnclipPipeline(
        feature_extractor=None, image_encoder=None,
        image_normalizer=StableUnCLIPImageNormalizer(width).to(device, dtype),
        image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"), tokenizer=None, text_encoder=None,
        unet=unet, vae=vae, scheduler=DDIMScheduler(prediction_type="v_prediction", clip_sample=False))
    return UnclipDetokenizer(pipeline)


def time_decoding(detokenizer: UnclipDetokenizer, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Seconds and pictures per second at each batch size, with the folder's (or the released) steps and guidance."""
    results: dict[str, Any] = {}
    for batch in options.batches:
        embeds = torch.randn(batch, detokenizer.embedding_dim, generator=torch.Generator().manual_seed(0))
        taken = measure(lambda e=embeds: detokenizer.decode(
            e, num_inference_steps=options.steps, guidance_scale=options.guidance,
            generator=torch.Generator().manual_seed(0)), device, options.repeats)
        results[f"decode_batch_{batch}"] = {"seconds": round(taken["seconds"], 4),
                                            "images_per_second": round(batch / taken["seconds"], 3)}
    return results


def timed(options: argparse.Namespace, runtime: Runtime) -> int:
    """Time and print the line; returns the exit code.

    Raises:
        CheckpointError, ConfigError: a folder that is no system, or incomplete.
    """
    if options.model:
        part = part_of(options.model, "detokenizer")
        detokenizer = UnclipDetokenizer.from_pretrained(part, device=runtime.device, dtype=runtime.dtype)
    else:
        detokenizer = random_detokenizer(options.size, runtime.device, runtime.dtype)
    results = time_decoding(detokenizer, options, runtime.device)
    if options.model:
        from seed_multimodal.systems.seed_llama import SeedLlama

        system = SeedLlama.from_pretrained(options.model, device=options.device, dtype=options.dtype)
        taken = measure(lambda: system.draw(options.text, seed=0), runtime.device, options.repeats)
        results["draw_from_text"] = {"seconds": round(taken["seconds"], 4)}
    pipeline = detokenizer.pipeline
    parts = [p for m in (pipeline.unet, pipeline.vae) for p in m.parameters()]
    settings = {"model": str(options.model or f"random weights, {options.size} size"), "runtime": str(runtime),
                "parameters": sum(p.numel() for p in parts), "repeats": options.repeats,
                "steps": options.steps or detokenizer.defaults.num_inference_steps,
                "guidance": detokenizer.defaults.guidance_scale if options.guidance is None else options.guidance}
    print_line("draw", runtime.device, settings, results, REFERENCES if options.size == "released" else None)
    return DONE


def main() -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Time the de-tokenizer and a drawing.")
    common_flags(parser, ("nano", "released"), 3, batches="1,8", model=True)
    parser.add_argument("--steps", type=positive, default=None, help="diffusion steps (default: the folder's, else 20)")
    parser.add_argument("--guidance", type=guidance, default=None, help="guidance (default: the folder's, else 10)")
    parser.add_argument("--text", default="a twemoji drawing of cat face", help="text of a whole drawing")
    options = parser.parse_args()
    runtime = runtime_of(parser, options, RELEASED_FP16)
    return guarded("draw", False, lambda: timed(options, runtime))


if __name__ == "__main__":
    raise SystemExit(main())
