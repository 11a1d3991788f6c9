"""Stages `recipes`, `llm` and `assemble`: the configurations of LaVIT's own trainings for nano-lavit, and the joining
of what they made into a system.

`recipes` writes the diffusion folder (a small U-Net with random weights, a scheduler, the layout decoder) and
`work/pixels.yaml` (pixel decoder) and `work/language.yaml` (stage 2). By hand, from the repository's folder:

    python MultiModalLLM/src/train/train_lavit_detokenizer.py --config-path WORK --config-name pixels
    python MultiModalLLM/src/train/train_lavit.py --config-path WORK --config-name language

Different from the published recipes: a random start; the U-Net predicts velocities under a schedule that ends at a
signal share, because sampling starts from the latents that the layout decoder expects, and so it needs no guidance; the
language model's matrices by Muon, and questions and edits beside captions.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from seed_multimodal.detokenizers.autoencoder import ELSEWHERE
from seed_multimodal.detokenizers.sdxl import LAYOUT
from seed_multimodal.disk import replace_text
from seed_multimodal.system_folder import join
from seed_multimodal.vision.shared_encoder import name_encoder
from seed_multimodal.weights import count_parameters
from seed_nano.train.assemble import halve
from seed_nano.train.successors import relative, trained_to_its_end, trainer_settings, write_unet
from seed_nano.train.workspace import absolute
from seed_nano.train_lavit.config import KINDS, READ_FIRST
from seed_nano.train_lavit.workspace import PREFIX, LavitSpace
from seed_nano.world.place import find_world
from seed_nano.world.verdicts import VERDICT_END

SCRIPT = "scripts/nano_lavit_speedrun.sh"
PIXELS, LANGUAGE = "pixels", "language"
DECODE = {"num_inference_steps": 4, "guidance_scale": 1.0}
SHAPES = ((64, 64), (56, 72), (48, 80), (80, 48), (72, 56))  # of LaVIT's six, for a square of 64 pixels
DECODERS = {"captions": ("lavit.caption", {"img_first_ratio": READ_FIRST}), "qa": ("lavit.question", {}),
            "edits": ("lavit.compose", {}), "asides": ("lavit.question", {})}
ROW = 256
MEAN_LENGTH = 36  # tokens of a sequence: turns `batch_size` sequences into packed rows
SELECTION = "draw"
_WRITTEN = {"guidance": 1.0, "do_sample": False, "min_new_tokens": 2, "max_new_tokens": 17}
SPEAKING = {"describe": {"num_beams": 1, "min_new_tokens": 1, "max_new_tokens": 48},
            "ask": {"num_beams": 1, "min_new_tokens": 1, "max_new_tokens": 64}, "draw": _WRITTEN, "compose": _WRITTEN}


def recipes(space: LavitSpace) -> dict[str, Any]:
    """Stage `recipes`; see the module."""
    space.need("narrow", space.tokenizer_folder / "config.json")
    space.need("layout", space.work / "layout" / "config.json")
    folder, sizes = space.decoder_folder, space.config.unet
    write_unet(folder, space.autoencoder, space.config.image_size, sizes.channels, sizes.heads,
               context=space.decoder_sizes.context_dim, pooled=sizes.pooled, seed=space.config.seed + 5)
    replace_text(folder / "seed_decode.json", json.dumps(DECODE))
    replace_text(folder / ELSEWHERE, json.dumps({"folder": relative(space.autoencoder, folder)}))
    shutil.copytree(space.work / "layout", folder / LAYOUT, dirs_exist_ok=True)
    files = []
    for name, made in ((PIXELS, _pixels(space)), (LANGUAGE, _language(space))):
        files.append(space.work / f"{name}.yaml")
        content = OmegaConf.to_yaml(OmegaConf.create({"output_dir": absolute(space.work / name), **made}))
        replace_text(files[-1], f"# Written from {space.work.absolute()}/config.yaml\n{content}")
    return {"files": " ".join(map(str, files)), "words": len(space.words)}


def _pixels(space: LavitSpace) -> dict[str, Any]:
    config, settings = space.config, space.config.train_pixels
    unit = config.image_size / 64
    return {
        "model": {"diffusion": absolute(space.decoder_folder), "tokenizer": absolute(space.tokenizer_folder),
                  "decoder": absolute(space.out / "decoder"), "trained": "all", "selection": SELECTION, "dropout": 0.0,
                  "seed": config.seed + 6},
        "data": {"sources": [{"name": "scenes", "format": "nano", "options": {
            "number": config.records, "seed": config.seed, "size": config.image_size}}],
            "batch_size": settings.batch_size, "sizes": [[int(side * unit) for side in shape] for shape in SHAPES],
            "tower_size": config.image_size, "keep_ratio": False, "seed": config.seed},
        "optim": {"name": "adamw", "learning_rate": settings.lr, "adam_beta2": 0.99, "adam_epsilon": 1e-8,
                  "weight_decay": settings.weight_decay, "lr_scheduler_type": "cosine",
                  "warmup_steps": settings.warmup, "min_lr_ratio": settings.min_lr_ratio},
        "trainer": {**trainer_settings(space, settings), "ema": settings.ema, "save_frozen": True}}


def _language(space: LavitSpace) -> dict[str, Any]:
    config, settings, sizes = space.config, space.config.train_llm, space.config.llm
    compiled = bool(shutil.which("g++")) if sizes.compile is None else sizes.compile
    world = absolute(find_world())
    sources = []
    for kind, weight in KINDS.items():
        decoder, options = DECODERS[kind]
        sources.append({"name": kind, "files": world, "format": "nano",
                        "format_options": {"content": kind, "number": config.records}, "decoder": decoder,
                        "weight": weight, "options": {**options, "base_resolution": config.image_size}})
    sized = {"sizes": {"hidden_size": sizes.width, "intermediate_size": sizes.ffn, "num_hidden_layers": sizes.layers,
                       "num_attention_heads": sizes.heads, "max_position_embeddings": sizes.positions,
                       "tie_word_embeddings": True, "rms_norm_eps": 1e-5}}
    start = Path(settings.start)
    return {
        "tokenizer": {"pretrained_model_name_or_path": absolute(space.words_folder)},
        "model": {**({"path": absolute(start / "llm")} if settings.start else sized),
                  "dtype": "fp32", "seed": config.seed + 7, "compile": compiled},
        "visual_encoder": {"path": absolute(space.tokenizer_folder), "selection": SELECTION, "at_once": 256,
                           "start": absolute(start / "tokenizer") if settings.start else None,
                           "seed": config.seed + 8},
        "data": {"packing": True, "length": ROW, "rows": max(1, settings.batch_size * MEAN_LENGTH // ROW),
                 "seed": config.seed + settings.seed, "too_long": "skip", "sources": sources},
        "optim": {"name": "muon", "learning_rate": settings.lr, "weight_decay": settings.weight_decay,
                  "lr_scheduler_type": "cosine", "warmup_steps": settings.warmup,
                  "min_lr_ratio": settings.min_lr_ratio},
        "trainer": trainer_settings(space, settings)}


# ------------------------------------------------------------------------------------------------------- the system


def install_llm(space: LavitSpace) -> dict[str, Any]:
    """Stage `llm`: the trained model as the folder `llm`, its merger and projector beside the tokenizer.

    Raises:
        CheckpointError: it was not trained to its end, or is damaged.
    """
    record = trained_to_its_end(space, LANGUAGE, space.config.train_llm.steps, SCRIPT)
    made = space.work / LANGUAGE / f"checkpoint-{record['steps']}"
    visual = made / "visual_weight.safetensors"
    space.need("llm", made / "config.json", visual)
    (space.out / "llm").mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        if (made / name).is_file():
            shutil.copyfile(made / name, space.out / "llm" / name)
    shutil.copyfile(visual, space.tokenizer_folder / visual.name)
    return {"stage": "llm", "seconds": record["seconds"], "tokens": int(record.get("tokens", 0))}


def assemble(space: LavitSpace) -> dict[str, Any]:
    """Stage `assemble`: pixel decoder and its heads, half precision, `system.json`; tower and autoencoder are named
    from where the system is.

    Raises:
        CheckpointError: a part is not there.
    """
    out = space.out
    trained_to_its_end(space, PIXELS, space.config.train_pixels.steps, SCRIPT)
    drawn = space.work / PIXELS / "pixels"
    for stage, file in (("narrow", space.tokenizer_folder / "config.json"), ("llm", out / "llm" / "config.json"),
                        ("recipes", space.decoder_folder / "unet" / "config.json")):
        space.need(stage, file)
    join("lavit", out, {"pixels/unet": drawn / "unet", "decoder": drawn / "decoder"},
         {"selection": SELECTION, "generation": SPEAKING, "answer_after": VERDICT_END})
    replace_text(space.decoder_folder / ELSEWHERE, json.dumps(
        {"folder": relative(space.autoencoder, space.decoder_folder)}))
    name_encoder(space.tokenizer_folder, space.nano_tokenizer / "model.safetensors", PREFIX)
    for file in sorted(out.rglob("*.safetensors")):
        halve(file)
    sizes = {part.name: round(sum(f.stat().st_size for f in part.rglob("*.safetensors")) / 1e6, 2)
             for part in sorted(out.iterdir()) if part.is_dir()}
    return {"weights_mb": round(sum(sizes.values()), 2),
            "parameters": sum(map(count_parameters, out.rglob("*.safetensors"))), **sizes, "folder": str(out)}
