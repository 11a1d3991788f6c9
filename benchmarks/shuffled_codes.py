"""nano with its codes in another order: does training by rewards need causal codes?

    python benchmarks/shuffled_codes.py --out log/shuffled

A code of nano depends on those before it. Here the language model writes the same codes in a fixed
random order: slot `j` has the code of position `order[j]`, under an id of section `j`. Written are
a system that draws them (it does not read images), and records of drawings with their `data.yaml`,
of which its language model learns the new order by `train.py`.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
import yaml
from torch import Tensor

from seed_multimodal.cli.common import program_parser
from seed_multimodal.data.formats.shards import write_shard
from seed_multimodal.disk import JsonObject
from seed_multimodal.entry import DONE, run_program
from seed_multimodal.images.transforms import normalise
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.models.seed.modeling import Seed2Tokenizer
from seed_multimodal.state_dicts import load_state_dict, save_state_dict
from seed_nano.train.task import scene_pixels
from seed_nano.world.records import record_at, scenes_of, with_images
from seed_nano.world.scene import Scene

BATCH = 256  # scenes that are encoded at once
SEED = 32  # of the order and the records


def shuffled_order(n_codes: int) -> list[int]:
    """The position of each slot's code."""
    order = list(range(n_codes))
    random.Random(SEED).shuffle(order)
    return order


def in_order(codes: Tensor, order: Sequence[int], section: int) -> Tensor:
    """Codes `[B, N]` by position → by slot; `section`: codes of a position."""
    positions = torch.tensor(order)
    within = codes[:, order] - positions * section
    return within + torch.arange(len(order)) * section


def write_system(nano: Path, folder: Path, order: Sequence[int]) -> None:
    """A copy of nano whose de-tokenizer and language model have the codes by slot."""
    shutil.copytree(nano, folder, dirs_exist_ok=True)  # of a run that was killed
    # 1. What the de-tokenizer has for each position: codes, their embedding, columns of the head.
    file = folder / "seed_tokenizer" / "model.safetensors"
    weights = load_state_dict(file)
    codebook = weights["quantize.embedding.weight"]
    head = weights["distill_image_proj.weight"]
    weights["quantize.embedding.weight"] = by_slot(codebook, order)
    weights["distill_image_proj.weight"] = by_slot(head.T, order).T.contiguous()
    weights["pos_embed_image"] = weights["pos_embed_image"][:, order].contiguous()
    save_state_dict(weights, file)

    # 2. The language model's embeddings of the codes, which are its output layer, too.
    vocabulary = MultimodalTokenizer.from_pretrained(folder / "seed_tokenizer").vocabulary
    file = folder / "seed_llama" / "model.safetensors"
    weights = load_state_dict(file)
    embeddings = weights["model.embed_tokens.weight"]
    codes = slice(vocabulary.n_text, vocabulary.n_text + vocabulary.n_codes)
    embeddings[codes] = by_slot(embeddings[codes], order)
    save_state_dict(weights, file)


def by_slot(rows: Tensor, order: Sequence[int]) -> Tensor:
    """Rows `[N · k, d]` by position → by slot."""
    return rows.unflatten(0, (len(order), -1))[order].flatten(0, 1)


def codes_part(codes: Sequence[int], scene: Scene) -> JsonObject:
    """What stands for a scene in a record."""
    return {"codes": list(codes)}


@torch.no_grad()
def write_draw_records(
    nano: Path, file: Path, order: Sequence[int], split: str, number: int
) -> None:
    """Records of drawings of a split, their codes by slot."""
    tokenizer = Seed2Tokenizer.from_pretrained(nano / "seed_tokenizer").eval()
    section = tokenizer.config.codebook_size // tokenizer.config.codebook_sections

    def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
        for start in range(0, number, BATCH):
            indices = range(start, min(start + BATCH, number))
            records = [record_at("draw", SEED, index, split) for index in indices]
            scenes = [scenes_of(record)[0] for record in records]
            codes = tokenizer.encode(
                normalise(scene_pixels(scenes, tokenizer.config.vit.image_size))
            )
            rows = in_order(codes, order, section).tolist()
            for index, record, row in zip(indices, records, rows, strict=True):
                content = with_images(record, partial(codes_part, row))
                yield f"draw-{index:06d}", {"json": json.dumps(content).encode()}

    write_shard(file, samples())


def run(args: argparse.Namespace) -> int:
    config = Seed2Tokenizer.read_config(args.nano / "seed_tokenizer" / "config.json")
    order = shuffled_order(config.num_query)
    write_system(args.nano, args.out / "system", order)
    for split, number in (("train", args.number), ("val", 500)):
        write_draw_records(args.nano, args.out / f"draw_{split}.tar", order, split, number)
    source = {"name": "draw", "files": str(args.out / "draw_train.tar"), "decoder": "chat"}
    data = {"packing": True, "length": 512, "rows": 8, "sources": [source]}
    (args.out / "data.yaml").write_text(yaml.safe_dump(data))
    print(f"{args.out}: slot 0 has the code of position {order[0]}, …: {order}")
    return DONE


def main(argv: Sequence[str] | None = None) -> int:
    parser = program_parser("python benchmarks/shuffled_codes.py", __doc__ or "")
    parser.add_argument("--out", type=Path, required=True, help="new folder")
    parser.add_argument("--nano", type=Path, default=Path("pretrained/nano"), help="the system")
    parser.add_argument("--number", type=int, default=40_000, help="records of drawings (40,000)")
    return run_program(parser, run, argv, "shuffled codes")


if __name__ == "__main__":
    raise SystemExit(main())
