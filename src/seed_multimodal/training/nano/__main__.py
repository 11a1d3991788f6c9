"""Train the parts of nano from scratch: `python -m seed_multimodal.training.nano --config configs/nano/pico.yaml`.

The tokenizer's two training stages run through the LAVIS application, between `recipe` and `tokenizer`; the language
model's two through MultiModalLLM, between `records` and `llm`; scripts/nano_speedrun.sh does it all. Stages run in
order and each continues where it stopped; `--only` picks some, so that independent ones can run side by side. At the
end `--out` is a system folder that `SeedLlama.from_pretrained` loads.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seed_multimodal.entry import guarded
from seed_multimodal.errors import SeedError
from seed_multimodal.training.nano.config import load_config, save_config
from seed_multimodal.training.nano.workspace import Workspace
from seed_multimodal.weights import load_state_dict, save_state_dict

STAGES = ("vae", "clip", "recipe", "tokenizer", "codes", "unet", "unet2", "vae2", "records", "llm", "assemble")


def main(arguments: list[str] | None = None) -> int:
    """Parse, run the stages, print a summary; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m seed_multimodal.training.nano", description=__doc__)
    parser.add_argument("--config", default="configs/nano/pico.yaml", help="settings (configs/nano/*.yaml)")
    parser.add_argument("--data", type=Path, default=None, help="nano set folder (default: the committed shard)")
    parser.add_argument("--work", type=Path, default=Path("runs/nano"), help="states, caches and logs")
    parser.add_argument("--out", type=Path, default=Path("runs/nano/system"), help="the finished system")
    parser.add_argument("--only", default="", help=f"comma-separated stages out of {', '.join(STAGES)}")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: all)")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("overrides", nargs="*", help="dotted settings such as train_vae.steps=100")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    return guarded("nano training", options.debug, lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    config = load_config(options.config, options.overrides)
    wanted = [s for s in options.only.split(",") if s] or list(STAGES)
    unknown = [s for s in wanted if s not in STAGES]
    if unknown:
        raise SeedError(f"Unknown stage {unknown[0]!r}: use {', '.join(STAGES)}.")
    options.work.mkdir(parents=True, exist_ok=True)
    save_config(config, options.work / "config.yaml")
    space = Workspace(config, options.data, options.work, options.out)
    started = time.monotonic()
    records = []
    for stage in wanted:
        print(f"== {stage}", flush=True)
        records.append((stage, RUN[stage](space)))
    print(f"\nDone in {(time.monotonic() - started) / 60:.1f} min; the system is in {options.out}.")
    for stage, record in records:
        print(f"  {stage:9s} {record.get('seconds', 0):7.0f} s  " + ", ".join(
            f"{k} {v}" for k, v in record.items() if k not in ("stage", "seconds", "steps", "batch_size")))
    return 0


def _vae(space: Workspace) -> dict[str, Any]:
    from seed_multimodal.training.nano.vae import train_vae

    pictures = space.views[space.index_tensor(), 0]
    return train_vae(space.config, pictures, space.views[torch.tensor(space.held_out), 0], space.work,
                     space.decoder_folder / "vae")


def _latents(space: Workspace) -> Tensor:
    from diffusers import AutoencoderKL

    from seed_multimodal.training.nano.vae import encode_latents

    def make() -> Tensor:
        vae = AutoencoderKL.from_pretrained(space.decoder_folder / "vae")
        views = space.views
        return encode_latents(vae, views.flatten(0, 1)).unflatten(0, views.shape[:2])

    return space.cached("latents", make)


def _clip(space: Workspace) -> dict[str, Any]:
    from seed_multimodal.training.nano.clip import train_clip

    record = train_clip(space.config, space.views, _latents(space), space.captions, space.train, space.held_out,
                        space.work, space.decoder_folder / "image_encoder", space.words.vocabulary.n_text)
    if not record["gate_passed"]:
        print(f"The gate was missed: held-out R² {record['r2']} < {record['gate_r2']}; pictures will be less faithful.")
    return record


def _embeddings(space: Workspace) -> Tensor:
    from transformers import CLIPVisionModelWithProjection

    from seed_multimodal.training.nano.clip import embed_images

    def make() -> Tensor:
        vision = CLIPVisionModelWithProjection.from_pretrained(space.decoder_folder / "image_encoder")
        return embed_images(vision, space.views.flatten(0, 1)).half().unflatten(0, space.views.shape[:2])

    return space.cached("embeddings", make)


def _recipe(space: Workspace) -> dict[str, Any]:
    from seed_multimodal.training.nano.tokenizer import latent_readout
    from seed_multimodal.training.nano.tokenizer_recipe import READOUT_FILE, write_recipes

    pool = space.index_tensor()
    matrix = latent_readout(_embeddings(space)[pool, 0].float(), _latents(space)[pool, 0].float().flatten(1))
    save_state_dict({"readout": matrix}, space.work / READOUT_FILE)
    _ = space.words  # made here if they are not there: both stages read them
    return {"files": " ".join(map(str, write_recipes(space)))}


def _tokenizer(space: Workspace) -> dict[str, Any]:
    from seed_multimodal.training.nano.tokenizer import code_metrics
    from seed_multimodal.training.nano.tokenizer_recipe import READOUT_FILE, join_stages

    return join_stages(space, lambda tokenizer: code_metrics(
        tokenizer, space.views, _embeddings(space), _latents(space),
        load_state_dict(space.work / READOUT_FILE)["readout"], space.held_out))


def _codes(space: Workspace) -> Tensor:
    from seed_multimodal.tokenizers.seed2 import Seed2Tokenizer
    from seed_multimodal.training.nano.tokenizer import encode_views

    return space.cached("codes", lambda: encode_views(
        Seed2Tokenizer.from_pretrained(space.tokenizer_folder), space.views, space.config.code_views,
        space.config.seed))


def _cache_codes(space: Workspace) -> dict[str, Any]:
    codes = _codes(space)
    return {"pictures": len(codes), "views": codes.shape[1]}


def _unet(space: Workspace) -> dict[str, Any]:
    from seed_multimodal.training.nano.unet import train_unet

    return train_unet(space.config, space.config.train_unet, "unet", _latents(space), _embeddings(space),
                      space.index_tensor(), space.work, space.work / "unet")


def _unet2(space: Workspace) -> dict[str, Any]:
    from seed_multimodal.training.nano.unet import decoded_embeddings, train_unet

    codes = _codes(space)[:, :space.config.views]  # those whose latents are known
    decoded = space.cached("decoded", lambda: decoded_embeddings(space.tokenizer_folder, codes))
    return train_unet(space.config, space.config.train_unet2, "unet2", _latents(space), _embeddings(space),
                      space.index_tensor(), space.work, space.decoder_folder, start=space.work / "unet",
                      decoded=decoded)


def _vae2(space: Workspace) -> dict[str, Any]:
    from seed_multimodal.training.nano.vae import train_decoder

    return train_decoder(space.config, space.views, _latents(space), space.index_tensor(),
                         space.views[torch.tensor(space.held_out), 0], space.work, space.decoder_folder / "vae")


def _records(space: Workspace) -> dict[str, Any]:
    from seed_multimodal.training.nano.llm_recipe import describe, write_llm_recipes, write_records

    counts = write_records(space, _codes(space))
    return describe(write_llm_recipes(space, counts), counts)


def _llm(space: Workspace) -> dict[str, Any]:
    from seed_multimodal.training.nano.llm_recipe import install_llm

    return install_llm(space)


def _assemble(space: Workspace) -> dict[str, Any]:
    from seed_multimodal.training.nano.assemble import assemble

    return assemble(space.config, space.out)


RUN: dict[str, Callable[[Workspace], dict[str, Any]]] = {
    "vae": _vae, "clip": _clip, "recipe": _recipe, "tokenizer": _tokenizer, "codes": _cache_codes,
    "unet": _unet, "unet2": _unet2, "vae2": _vae2,
    "records": _records, "llm": _llm, "assemble": _assemble,
}

if __name__ == "__main__":
    raise SystemExit(main())
