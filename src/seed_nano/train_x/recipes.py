"""Stages `recipes`, `agent` and `assemble`: the configurations of SEED-X's own trainings for nano-x, and the joining of
what they made into a system.

`recipes` writes SDXL's folder (a small U-Net with random weights, a scheduler) and `work/first.yaml`, `second.yaml`
(the de-tokenizer's two stages) and `sft.yaml` (instruction tuning). By hand, from the repository's folder:

    python MultiModalLLM/src/train/train_seed_x_detokenizer.py --config-path WORK --config-name first      then second
    python MultiModalLLM/src/train/train_seed_x_sft.py --config-path WORK --config-name sft

Different from the released recipes: a random start, all of the U-Net is trained in both stages, no LoRA, matrices by
Muon; 16 features a picture, which are not averaged; the U-Net predicts velocities under a schedule that ends at a
signal share of 0.98, because sampling starts from the latents that the layout decoder expects.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from seed_multimodal.detokenizers.autoencoder import ELSEWHERE, autoencoder_folder
from seed_multimodal.detokenizers.sdxl import LAYOUT
from seed_multimodal.disk import replace_text
from seed_multimodal.language.continuous import AgentSettings, ContinuousLVLM
from seed_multimodal.system_folder import join
from seed_multimodal.vision.resampler import Resampler, ResamplerConfig
from seed_multimodal.weights import count_parameters, save_state_dict
from seed_nano.train.assemble import halve
from seed_nano.train.successors import relative, trained_to_its_end, trainer_settings, write_unet
from seed_nano.train.workspace import absolute
from seed_nano.train_x.config import KINDS
from seed_nano.train_x.workspace import XWorkspace
from seed_nano.world.place import find_world
from seed_nano.world.source import X_KIND
from seed_nano.world.verdicts import VERDICT_END
from seed_nano.world.x_records import OWN

FIRST, SECOND, SFT = "first", "second", "sft"
SCRIPT = "scripts/nano_x_speedrun.sh"
DECODE = {"num_inference_steps": 4, "guidance_scale": 1.0, "image_guidance_scale": 1.0}
GRIDS, ROW = ["1x1", "2x2"], 512
ONE_VIEW = 0.25  # share of the wide kinds' records that are read in one view, to be compared with several
AGENT = AgentSettings(vit_down=False, rec_loss_scale=1.5)  # published: 6; then words are a seventh of the loss here
MEAN_LENGTH = 90  # tokens of a sequence: turns `batch_size` sequences into packed rows


def recipes(space: XWorkspace) -> dict[str, Any]:
    """Stage `recipes`; see the module."""
    space.need("tower", space.out / "vision" / "config.json")
    write_sdxl(space)
    files = [_write(space, name, made) for name, made in (
        (FIRST, _detokenizer(space, 1)), (SECOND, _detokenizer(space, 2)), (SFT, _tuning(space)))]
    return {"files": " ".join(map(str, files)), "words": len(space.words)}


def _write(space: XWorkspace, name: str, recipe: dict[str, Any]) -> Path:
    file = space.work / f"{name}.yaml"
    made = OmegaConf.create({"output_dir": absolute(space.work / name), **recipe})
    replace_text(file, f"# Written from {space.work.absolute()}/config.yaml\n{OmegaConf.to_yaml(made)}")
    return file


# ------------------------------------------------------------------------------------------------- the de-tokenizer


def write_sdxl(space: XWorkspace) -> None:
    """SDXL's folder: the autoencoder is there; a new U-Net, the scheduler, defaults of drawing."""
    folder, sizes = space.decoder_folder, space.config.unet
    write_unet(folder, autoencoder_folder(folder), space.config.image_size, sizes.channels, sizes.heads,
               context=sizes.prompt, pooled=sizes.prompt // 2, seed=space.config.seed + 4)
    replace_text(folder / "seed_decode.json", json.dumps(DECODE))


def _detokenizer(space: XWorkspace, stage: int) -> dict[str, Any]:
    config, unet = space.config, space.config.unet
    settings = (config.train_first, config.train_second)[stage - 1]
    plain: dict[str, Any] = {"name": "scenes", "format": "nano", "weight": 0.4,
                             "options": {"number": config.records, "seed": config.seed, "size": config.image_size}}
    edits = {"name": "edits", "format": "nano", "weight": 0.6,
             "options": {"content": "edits", "number": config.records, "seed": config.seed}}
    return {
        "model": {
            "stage": stage, "sdxl": absolute(space.decoder_folder), "tower": absolute(space.out / "vision"),
            "start": absolute(space.work / FIRST / "adapter") if stage == 2 else "", "trained": "all", "tokens": 0,
            "resampler": {"dim": unet.dim, "depth": unet.depth, "dim_head": unet.dim // unet.heads,
                          "heads": unet.heads, "num_queries": unet.queries, "embedding_dim": config.tower.features,
                          "output1_dim": unet.prompt // 2, "output2_dim": unet.prompt // 2, "ff_mult": 2},
            "seed": config.seed + 6},
        "data": {"sources": [plain] if stage == 1 else [plain, edits], "batch_size": settings.batch_size,
                 "resolution": config.image_size, "tower_size": config.image_size, "keep_ratio": False,
                 "seed": config.seed},
        "optim": {"name": "adamw", "learning_rate": settings.lr, "adam_beta2": 0.99, "adam_epsilon": 1e-8,
                  "weight_decay": settings.weight_decay, "lr_scheduler_type": "cosine",
                  "warmup_steps": settings.warmup, "min_lr_ratio": settings.min_lr_ratio},
        "trainer": {**trainer_settings(space, settings), "ema": settings.ema, "save_frozen": True}}


# ----------------------------------------------------------------------------------------------- instruction tuning


def _tuning(space: XWorkspace) -> dict[str, Any]:
    config, settings = space.config, space.config.train_sft
    sizes, start = config.llm, Path(settings.start)
    compiled = bool(shutil.which("g++")) if sizes.compile is None else sizes.compile
    return {
        "tokenizer": {"pretrained_model_name_or_path": absolute(space.tokenizer_folder)},
        "model": {**({"path": absolute(start / "llm")} if settings.start else {"sizes": llama_sizes(space)}),
                  "dtype": "fp32", "seed": config.seed + 5, "compile": compiled, "template": "llama2"},
        "agent": {"path": absolute(start / "agent") if settings.start else None,
                  **{name: asdict(one) for name, one in resamplers(space).items()},
                  "losses": asdict(AGENT), "seed": config.seed + 7},
        "visual_encoder": {"path": absolute(space.out / "vision"), "at_once": 128},
        "data": {"packing": True, "length": ROW, "rows": max(1, settings.batch_size * MEAN_LENGTH // ROW),
                 "seed": config.seed + settings.seed, "too_long": "skip", "sources": _sources(space)},
        "optim": {"name": "muon", "learning_rate": settings.lr, "weight_decay": settings.weight_decay,
                  "lr_scheduler_type": "cosine", "warmup_steps": settings.warmup,
                  "min_lr_ratio": settings.min_lr_ratio},
        "trainer": trainer_settings(space, settings)}


def _sources(space: XWorkspace) -> list[dict[str, Any]]:
    world = absolute(find_world())
    found = []
    for kind, weight in KINDS.items():
        shares = ((GRIDS, 1 - ONE_VIEW), (["1x1"], ONE_VIEW)) if kind in OWN[1:] else ((GRIDS, 1.0),)
        for grids, share in shares:
            found.append({
                "name": kind if grids == GRIDS else f"{kind}_in_one", "files": world, "format": "nano",
                "format_options": {"content": f"{X_KIND}{kind}", "number": space.config.records},
                "decoder": "seed_x.chat",
                "weight": weight * share,
                "options": {"base_resolution": space.config.image_size, "resolution_grids": grids}})
    return found


def llama_sizes(space: XWorkspace) -> dict[str, Any]:
    """Of the language model, for transformers' `LlamaConfig`."""
    sizes = space.config.llm
    return {"hidden_size": sizes.width, "intermediate_size": sizes.ffn, "num_hidden_layers": sizes.layers,
            "num_attention_heads": sizes.heads, "max_position_embeddings": sizes.positions,
            "tie_word_embeddings": True, "rms_norm_eps": 1e-5}


def resamplers(space: XWorkspace) -> dict[str, ResamplerConfig]:
    """Of the agent."""
    tower, llm = space.config.tower, space.config.llm
    return {"input_resampler": ResamplerConfig(tower.grid, llm.width, llm.heads, tower.features),
            "output_resampler": ResamplerConfig(tower.grid, tower.features, tower.pool_heads, llm.width)}


# ------------------------------------------------------------------------------------------------------- the system


def install_agent(space: XWorkspace) -> dict[str, Any]:
    """Stage `agent`: the tuned model as the folders `llm` and `agent`.

    Raises:
        CheckpointError: it was not trained to its end, or is damaged.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    record = trained_to_its_end(space, SFT, space.config.train_sft.steps, SCRIPT)
    words, parts = space.words, resamplers(space)
    llm = LlamaForCausalLM(LlamaConfig(vocab_size=words.vocabulary.size, bos_token_id=words.bos_id,
                                       eos_token_id=words.eos_id, pad_token_id=words.pad_id, **llama_sizes(space)))
    agent = ContinuousLVLM.from_pretrained(
        llm, Resampler(parts["input_resampler"]), Resampler(parts["output_resampler"]),
        space.work / SFT / f"checkpoint-{record['steps']}", **asdict(AGENT))
    llm.save_pretrained(space.out / "llm")
    save_state_dict({name: value for name, value in agent.state_dict().items() if not name.startswith("llm.")},
                    space.out / "agent" / "model.safetensors")
    replace_text(space.out / "agent" / "config.json", json.dumps(
        {**{name: asdict(one) for name, one in parts.items()}, "settings": asdict(AGENT)}, indent=1))
    return {"stage": "agent", "seconds": record["seconds"], "tokens": int(record.get("tokens", 0))}


def share_autoencoder(space: XWorkspace) -> None:
    """A system beside the nano that it was built on names that one's autoencoder instead of keeping a copy."""
    own, start = space.decoder_folder / "vae", (space.start / "vae").resolve()
    if own.is_dir() and start.is_relative_to(space.out.resolve().parent):
        shutil.rmtree(own)
        replace_text(space.decoder_folder / ELSEWHERE, json.dumps(
            {"folder": relative(start, space.decoder_folder)}))


def assemble(space: XWorkspace) -> dict[str, Any]:
    """Stage `assemble`: the de-tokenizer with its layout decoder, half precision, `system.json`.

    Raises:
        CheckpointError: a part is not there.
    """
    out = space.out
    for stage, folder in (("start", autoencoder_folder(space.decoder_folder)), ("tower", out / "vision"),
                          ("agent", out / "llm"), ("layout", space.work / "layout")):
        space.need(stage, folder / "config.json")
    trained_to_its_end(space, SECOND, space.config.train_second.steps, SCRIPT)
    target = out / "detokenizer"
    join("seed_x", out, {"detokenizer": space.work / SECOND / "adapter"}, {
        "tuned": True, "grids": GRIDS, "edit_grids": GRIDS, "generation": {"max_new_tokens": 120, "do_sample": False},
        "tasks": {"draw_words": 0, "edit_words": 64, "answer_after": VERDICT_END}})
    shutil.copytree(space.work / "layout", target / LAYOUT, dirs_exist_ok=True)
    share_autoencoder(space)
    for file in sorted(out.rglob("*.safetensors")):
        halve(file)
    sizes = {part.name: round(sum(f.stat().st_size for f in part.rglob("*.safetensors")) / 1e6, 2)
             for part in sorted(out.iterdir()) if part.is_dir()}
    parameters = sum(map(count_parameters, out.rglob("*.safetensors")))
    return {"weights_mb": round(sum(sizes.values()), 2), "parameters": parameters, **sizes, "folder": str(out)}
