"""Time the SEED-2 tokenizer: pictures → codes, and codes → embedding. One JSON line.

    python benchmarks/tokenizer.py --model pretrained/nano                      # the shipped weights
    python benchmarks/tokenizer.py --size released --device cuda --dtype float16   # random weights of released size
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from seed_multimodal.device import choose_device
from seed_multimodal.evaluation.timing import fill_random, measure, print_line
from seed_multimodal.tokenizers.qformer import QFormerConfig
from seed_multimodal.tokenizers.seed2 import Seed2Tokenizer
from seed_multimodal.tokenizers.seed2_config import Seed2Config
from seed_multimodal.vision.eva import EvaConfig

# The original's code, random weights of released size, fp16 on one H200 (2026-11-20).
REFERENCES = {"encode_images_per_second": {"1": 34.1, "32": 436, "256": 524},
              "decode_per_second": {"1": 559, "256": 141000}}


def nano_config() -> Seed2Config:
    """A tokenizer of about the shipped size, for timing without weights."""
    return Seed2Config(vit=EvaConfig(64, 16, 192, 5, 6, 768), qformer=QFormerConfig(width=192, depth=4, heads=6,
                       mlp_width=768), codebook_size=512, codebook_dim=16, decode_depth=3, image_features_dim=256)


def load(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> tuple[Seed2Tokenizer, str]:
    """The tokenizer of a system's folder, or random weights of a size; and what it is."""
    if options.model:
        folder = Path(options.model)
        settings = json.loads((folder / "system.json").read_text(encoding="utf-8"))
        part = folder / settings.get("tokenizer", "seed_tokenizer")
        return Seed2Tokenizer.from_pretrained(part, device=device, dtype=dtype), str(folder)
    with torch.device("meta"):
        model = Seed2Tokenizer(Seed2Config() if options.size == "released" else nano_config())
    fill_random(model, device, dtype)
    return model, f"random weights, {options.size} size"


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Time the SEED-2 tokenizer.")
    parser.add_argument("--model", help="folder of a system; without it random weights of --size are timed")
    parser.add_argument("--size", choices=("nano", "released"), default="nano")
    parser.add_argument("--batches", default="1,32,256")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    runtime = choose_device(options.device, options.dtype, log=None)
    model, what = load(options, runtime.device, runtime.dtype)
    config, results = model.config, {"encode_images_per_second": {}, "decode_per_second": {}}
    generator = torch.Generator().manual_seed(0)
    for batch in map(int, options.batches.split(",")):
        size = config.vit.image_size
        pixels = torch.randn(batch, 3, size, size, generator=generator).to(runtime.device, runtime.dtype)
        codes = torch.randint(0, config.codebook_size, (batch, config.num_query), generator=generator)
        codes = codes.to(runtime.device)
        for name, work in (("encode_images_per_second", lambda p=pixels: model.encode(p)),
                           ("decode_per_second", lambda c=codes: model.decode(c))):
            taken = measure(work, runtime.device, options.repeats)
            results[name][str(batch)] = round(batch / taken["seconds"], 1)
    settings = {"model": what, "parameters": sum(p.numel() for p in model.parameters()), "runtime": str(runtime),
                "repeats": options.repeats}
    print_line("tokenizer", runtime.device, settings, results, REFERENCES if options.size == "released" else None)


if __name__ == "__main__":
    main()
