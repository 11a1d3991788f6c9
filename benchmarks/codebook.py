"""Codebook health on nano's scenes: the original's plain VQ and each remedy, everything else equal.

    python benchmarks/codebook.py [--steps 600] [--out benchmarks/codebook.jsonl]

The encoder is `pretrained/nano`'s frozen Q-Former; every variant trains quantiser and decode side anew with the
published loss weights (5, 2, 0.5) from the same seed, on the same batches. One JSON line per variant, then a table.
Measured on 1,000 val scenes: share of the codebook used, perplexity, the part of the image embedding's variance that
the codes leave unexplained, and how often the decoded embedding is nearest to its own picture's among all of them
(R@1).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from seed_multimodal.entry import guarded
from seed_multimodal.evaluation.machine import hardware, today, versions
from seed_multimodal.tokenizers.seed2 import Seed2Config, Seed2Tokenizer
from seed_multimodal.tokenizers.stage2 import Stage2Model
from seed_multimodal.training.schedules import batch_indices
from seed_nano.train.clip import embed_images
from seed_nano.train.pixels import scene_pixels, to_clip
from seed_nano.world.splits import scene_at


@dataclasses.dataclass(frozen=True)
class Variant:
    """One remedy against codebook collapse."""

    name: str
    size: int = 512
    kmeans: bool = False
    restart: bool = False
    ema: float | None = None
    cosine: bool = False
    sections: bool = False


VARIANTS = (
    Variant("plain VQ, 8,192 codes (original)", size=8192),
    Variant("plain VQ, 512 codes"),
    Variant("EMA updates", ema=0.99),
    Variant("k-means start", kmeans=True),
    Variant("dead-code restart", restart=True),
    Variant("k-means + restart", kmeans=True, restart=True),
    Variant("k-means + restart + EMA", kmeans=True, restart=True, ema=0.99),
    Variant("k-means + restart, cosine codes", kmeans=True, restart=True, cosine=True),
    Variant("k-means + restart, 32 sections of 16", kmeans=True, restart=True, sections=True),
)


@dataclasses.dataclass
class Features:
    """Q-Former output `[N, 32, D]` and target image embedding `[N, E]` of every picture; rows of each split."""

    queries: Tensor
    targets: Tensor
    train: Tensor
    val: Tensor


@torch.no_grad()
def collect(model: str, train: int = 8192, val: int = 1000) -> tuple[Seed2Config, Features]:
    """Run the frozen towers of the nano system once over so many scenes of each split."""
    from transformers import CLIPVisionModelWithProjection

    folder = Path(model) / "seed_tokenizer"
    tokenizer = Seed2Tokenizer.from_pretrained(folder)
    scenes = [scene_at(0, number, split) for split, count in {"train": train, "val": val}.items()
              for number in range(count)]
    pixels = scene_pixels(scenes, tokenizer.config.vit.image_size)
    queries = torch.cat([tokenizer.query_features(to_clip(part)) for part in pixels.split(512)])
    vision = CLIPVisionModelWithProjection.from_pretrained(folder / "diffusion_model" / "image_encoder")
    return tokenizer.config, Features(queries, embed_images(vision, pixels), torch.arange(train),
                                      torch.arange(train, train + val))


def train(variant: Variant, base: Seed2Config, data: Features, steps: int, batch: int) -> dict[str, object]:
    """Train one variant; returns its record."""
    torch.manual_seed(0)
    config = dataclasses.replace(base, codebook_size=variant.size, normalize_codes=variant.cosine, recon_s=True,
                                 codebook_sections=base.num_query if variant.sections else 1)
    model = Stage2Model(config, ema_decay=variant.ema, frozen_dropout=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.1)
    if variant.kmeans:
        some = data.train[torch.randperm(len(data.train), generator=torch.Generator().manual_seed(1))[:1024]]
        with torch.no_grad():
            model.quantize.init_from(model.pre_quant_from_features(data.queries[some]))
    started = time.monotonic()
    for step in range(steps):
        chosen = data.train[batch_indices(step, batch, len(data.train), 0)]
        # The fused attention kernel's bf16 backward is slow on CPUs.
        with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", torch.bfloat16):
            out = model(None, data.targets[chosen], query_features=data.queries[chosen])
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if variant.restart and step % 50 == 49 and step < 0.8 * steps:
            model.quantize.restart_dead(out.pre_quant.float())
    return {"variant": variant.name, "steps": steps, "batch": batch,
            "seconds": round(time.monotonic() - started, 1), **measure(model, data)}


@torch.no_grad()
def measure(model: Stage2Model, data: Features) -> dict[str, object]:
    """Usage, perplexity, unexplained variance and retrieval on the val split."""
    model.eval()
    codes = model.quantize.nearest(model.pre_quant_from_features(data.queries[data.val]))
    decoded, target = model.decode(codes), data.targets[data.val]
    usage = model.quantize.usage(codes)
    centre = data.targets[data.train].mean(0)
    unexplained = (decoded - target).square().sum() / (target - centre).square().sum()
    near = F.normalize(decoded - centre, dim=1) @ F.normalize(target - centre, dim=1).T
    return {"codes": model.quantize.size, "used": usage.used, "used_share": round(usage.fraction, 4),
            "perplexity": round(usage.perplexity, 1), "unexplained_embedding": round(float(unexplained), 4),
            "r1": round(float((near.argmax(1) == torch.arange(len(near))).float().mean()), 4),
            "distinct_sequences": len({tuple(row) for row in codes.tolist()}), "scenes": len(codes)}


def table(records: list[dict[str, object]]) -> str:
    """Markdown table of the records."""
    lines = ["| codebook | codes used | perplexity | unexplained | R@1 |", "|---|---|---|---|---|"]
    for r in records:
        lines.append(f"| {r['variant']} | {r['used']} of {r['codes']} | {r['perplexity']} | "
                     f"{r['unexplained_embedding']:.3f} | {r['r1']:.2f} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pretrained/nano")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--only", default="", help="run only variants whose name contains this")
    parser.add_argument("--out", type=Path, default=None, help="append the JSON lines to this file too")
    parser.add_argument("--debug", action="store_true")
    options = parser.parse_args(arguments)
    variants = [variant for variant in VARIANTS if options.only in variant.name]
    if not variants:
        parser.error(f"--only {options.only!r}: no variant has this in its name")

    def work() -> int:
        base, data = collect(options.model)
        print(f"{len(data.queries):,} scenes encoded; training {len(variants)} codebooks.", flush=True)
        records = []
        for variant in variants:
            record = {"benchmark": "codebook", **train(variant, base, data, options.steps, options.batch),
                      "date": today(), "hardware": hardware(), "versions": versions()}
            print(json.dumps(record), flush=True)
            if options.out:
                with open(options.out, "a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
            records.append(record)
        print("\n" + table(records))
        return 0

    return guarded("codebook", options.debug, work)


if __name__ == "__main__":
    raise SystemExit(main())
