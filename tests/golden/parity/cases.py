"""The cases of `recorded.json`: batches of the data interfaces, losses in the logs of training
runs; all synthetic."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import platform
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import lavis_runs
import llm_runs
import numpy as np
import torch
from llm_runs import write_json_lines, write_tar
from PIL import Image

import seed_multimodal  # noqa: F401  (before transformers: it sets HF_HUB_OFFLINE)

HERE = Path(__file__).resolve().parent
WORDS = HERE / "words"  # the tokenizer of the records; the shipped one may change
BATCHES = 200
EVERY = 20
STEPS = 30


def environment() -> str:
    """Processor and torch: floating-point results are bit-identical where they are the same."""
    cpu = Path("/proc/cpuinfo")
    wanted = ("model name", "cpu family", "model\t", "flags")
    lines = (
        cpu.read_text().split("\n\n")[0].splitlines() if cpu.is_file() else [platform.processor()]
    )
    text = (
        "\n".join(line for line in lines if line.startswith(wanted)) if cpu.is_file() else lines[0]
    )
    return f"torch {torch.__version__}, processor {hashlib.sha256(text.encode()).hexdigest()[:12]}"


# ---- files


def png(index: int) -> bytes:
    """A PNG with noise of this seed."""
    pixels = np.random.default_rng(index).integers(0, 256, (22, 28, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


class Captions:
    """The captions of 4,359 images that are no longer shipped, each with the same image."""

    layout = None  # not in shards

    def __init__(self) -> None:
        lines = gzip.decompress((HERE / "captions.jsonl.gz").read_bytes()).decode().splitlines()
        self.rows = [json.loads(line) for line in lines]
        self.image = png(0)

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, index: int) -> str:
        return self.rows[index][0]

    def read(self, index: int) -> Any:
        from seed_multimodal.data.formats.pairs import Pair

        key, captions = self.rows[index]
        return Pair(key, key, self.image, captions)


def write_pairs(folder: Path) -> dict[str, Any]:
    """The same 40 pairs as shards and as a json list, and `Captions`: name → data source or its
    description."""
    captions = [[f"Picture {n}.", f"A  view of number {n}!"] for n in range(40)]
    start = 0
    for shard, size in enumerate((13, 7, 1, 19)):
        write_tar(
            folder / "tars" / f"s-{shard:03d}.tar",
            (
                {"png": png(n), "json": json.dumps({"caption": captions[n]}).encode()}
                for n in range(start, start + size)
            ),
        )
        start += size
    for n in range(40):
        (folder / f"{n:02d}.png").write_bytes(png(n))
    (folder / "pairs.json").write_text(
        json.dumps([{"image": f"{n:02d}.png", "caption": captions[n]} for n in range(40)])
    )
    return {
        "tar": {"format": "tar", "files": str(folder / "tars" / "*.tar")},
        "json": {"format": "json", "files": str(folder / "pairs.json"), "image_root": str(folder)},
        "nano": Captions(),
    }


def write_mixture(folder: Path) -> dict[str, Any]:
    """A data configuration of captions and interleaved documents in shards, texts and chats as json
    lines."""
    rng = random.Random(3)

    def codes() -> list[int]:
        return [rng.randrange(1024) for _ in range(32)]

    def words(max_words: int) -> str:
        return " ".join(
            rng.choices(
                "a red fox sits on the green hill under one small yellow moon".split(),
                k=rng.randint(1, max_words),
            )
        )

    def member(record: dict[str, Any]) -> dict[str, bytes]:
        return {"json": json.dumps(record).encode()}

    write_tar(
        folder / "captions" / "0.tar",
        (member({"image_ids": codes(), "text": words(9)}) for _ in range(40)),
    )
    write_tar(
        folder / "captions" / "1.tar",
        (member({"image_ids": codes(), "text": words(9)}) for _ in range(11)),
    )
    write_tar(
        folder / "documents" / "0.tar",
        (
            member(
                {
                    "image_ids": [codes(), None, codes(), None],
                    "metadata": {},
                    ("no texts" if index == 7 else "texts"): [None, words(8), None, words(8)],
                }
            )  # the eighth is skipped
            for index in range(25)
        ),
    )
    write_json_lines(folder / "texts.jsonl", ({"text": words(60)} for _ in range(30)))
    write_json_lines(
        folder / "chats.jsonl",
        (
            {
                "messages": [
                    {"role": "user", "content": [{"codes": codes()}, words(6)]},
                    {"role": "assistant", "content": [words(12)]},
                ]
            }
            for _ in range(35)
        ),
    )
    options = {"reverse_ratio": 0.5}
    return {
        "sources": [
            {
                "name": "captions",
                "files": str(folder / "captions"),
                "decoder": "pretrain.caption",
                "weight": 4,
                "options": options,
                "batch_size": 4,
                "max_length": 64,
            },
            {
                "name": "documents",
                "files": str(folder / "documents"),
                "decoder": "pretrain.interleaved",
                "weight": 1,
                "options": options,
                "batch_size": 2,
                "max_length": 160,
            },
            {
                "name": "texts",
                "files": str(folder / "texts.jsonl"),
                "decoder": "pretrain.text",
                "weight": 2,
                "batch_size": 3,
                "max_length": 96,
            },
            {
                "name": "chats",
                "files": str(folder / "chats.jsonl"),
                "decoder": "chat",
                "weight": 2,
                "batch_size": 2,
                "max_length": 128,
            },
        ],
        "length": 192,
        "rows": 2,
        "seed": 11,
    }


# ---- digests of batches


def running(
    open_rank: Callable[..., Any], world: int, content: Callable[[Any], dict[str, bytes]]
) -> dict[str, list[str]]:
    """For each part of the content the running SHA-256 over all batches of all ranks, every 20
    steps."""
    totals: dict[str, Any] = {}
    digests: dict[str, list[str]] = {}
    with ExitStack() as stack:
        ranks = [stack.enter_context(open_rank(rank=rank, world=world)) for rank in range(world)]
        for step in range(BATCHES):
            for rank in ranks:
                batch = next(rank) if isinstance(rank, Iterator) else rank.at(step)
                for part, content_of_part in content(batch).items():
                    totals.setdefault(part, hashlib.sha256()).update(content_of_part)
            if (step + 1) % EVERY == 0:
                for part, total in totals.items():
                    digests.setdefault(part, []).append(total.hexdigest()[:16])
    return digests


def pairs(batch: dict[str, Any]) -> dict[str, bytes]:
    """Indices, keys and captions; pixels of the views."""
    from seed_multimodal.images.transforms import normalise

    content = (
        batch["index"].numpy().tobytes() + json.dumps([batch["key"], batch["caption"]]).encode()
    )
    return {"drawn": content, "pixels": normalise(batch["image"]).numpy().tobytes()}


def rows(batch: Any) -> dict[str, bytes]:
    tensors = {
        name: getattr(batch, name)
        for name in ("input_ids", "labels", "position_ids", "attention_mask")
    }
    return {
        "rows": b"".join(
            f"{name} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes()
            for name, tensor in tensors.items()
            if tensor is not None
        )
    }


PAIRS = {
    "tar, 1 process": ("tar", 1, 0),
    "tar, 1 process, 2 workers": ("tar", 1, 2),
    "json, 2 processes": ("json", 2, 0),
    "nano, 3 processes": ("nano", 3, 0),
}
ROWS = {
    "packed, 1 process": (True, 1, 0),
    "packed, 1 process, 2 workers": (True, 1, 2),
    "packed, 2 processes": (True, 2, 0),
    "packed, 3 processes": (True, 3, 0),
    "padded, 1 process": (False, 1, 0),
    "padded, 2 processes": (False, 2, 0),
    "padded, 3 processes": (False, 3, 0),
}


def pair_digests(case: str, folder: Path) -> dict[str, list[str]]:
    from seed_multimodal.data.formats.pairs import open_pairs
    from seed_multimodal.data.stream.loader import StepBatches
    from seed_multimodal.data.stream.pairs_dataset import PairDataset
    from seed_multimodal.images.augment import TrainTransform
    from seed_multimodal.models.seed.captions import BlipCaption

    kind, world, workers = PAIRS[case]
    spec = write_pairs(folder)[kind]
    source = open_pairs(spec) if isinstance(spec, dict) else spec
    transform = TrainTransform(
        16, scaled_decoding=False
    )  # the recorded views are of images decoded in full
    return running(
        lambda **position: StepBatches(
            PairDataset(source, transform, BlipCaption(), seed=7, log=None),
            2,
            seed=7,
            workers=workers,
            **position,
        ),
        world,
        pairs,
    )


def row_digests(case: str, folder: Path) -> dict[str, list[str]]:
    from seed_multimodal.data.stream.config import read_data_settings
    from seed_multimodal.data.stream.llm_batches import LlmBatches
    from seed_multimodal.language.tokenizer import MultimodalTokenizer

    packing, world, workers = ROWS[case]
    settings = read_data_settings({**write_mixture(folder), "packing": packing})
    tokenizer = MultimodalTokenizer.from_pretrained(WORDS)
    return running(
        lambda **position: LlmBatches(settings, tokenizer, workers=workers, **position), world, rows
    )


# ---- losses


def language_model(folder: Path, *more: str, processes: int = 1, **changes: Any) -> list[float]:
    from seed_multimodal.training.cli import parse, run

    folder.mkdir(parents=True, exist_ok=True)
    files = llm_runs.write_files(
        folder, tokenizer={"pretrained_model_name_or_path": str(WORDS)}, **changes
    )
    arguments = llm_runs.overrides(files, folder / "out", f"trainer.max_steps={STEPS}", *more)
    if processes > 1:
        llm_runs.run(arguments, before=llm_runs.torchrun())
    else:
        run("train", llm_runs.APPLICATION / "configs", parse(arguments))
    return list(llm_runs.losses(folder / "out").values())


PLAIN_LORA = {"lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0}}
MUON = {
    "name": "muon",
    "learning_rate": 2.0e-3,
    "weight_decay": 0.01,
    "warmup_ratio": 0.1,
    "min_lr_ratio": 0.02,
}


def tokenizer(folder: Path, stage: str, log: str, *options: str) -> list[float]:
    images = folder / "images"
    images.mkdir(parents=True)
    for n in range(24):
        (images / f"{n:02d}.png").write_bytes(png(n))
    (images / "pairs.json").write_text(
        json.dumps(
            [
                {"image": f"{n:02d}.png", "caption": [f"picture number {n}", "a red apple"]}
                for n in range(24)
            ]
        )
    )
    arguments = lavis_runs.write_config(stage, images, folder / "out")
    if str(lavis_runs.APPLICATION) not in sys.path:
        sys.path.append(str(lavis_runs.APPLICATION))
    import train

    tokenizer_options = [f"model.text_tokenizer={WORDS}"] if stage == "stage1" else []
    argv = [
        *arguments,
        "--options",
        "run.iters_per_epoch=15",
        "run.max_epoch=2",
        *tokenizer_options,
        *options,
    ]
    train.build(train.parser("").parse_args(argv)).train()
    return list(llm_runs.losses(folder / "out", f"{log}.log.jsonl", "last_loss").values())


def vision_encoder(folder: Path) -> Path:
    """A CLIP vision encoder with random weights for the target of stage 2."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=64,
            patch_size=16,
            projection_dim=256,
        )
    ).save_pretrained(folder)
    return folder


def seed1_tokenizer(folder: Path) -> list[float]:
    torch.manual_seed(0)
    diffusion = lavis_runs.write_text_encoder(folder / "diffusion")
    return tokenizer(
        folder,
        "seed1",
        "seed1-stage2",
        "model.load_pretrained=False",
        f"model.text_encoder={diffusion}",
    )


LOSSES: dict[str, Callable[[Path], list[float]]] = {
    "language model": language_model,
    "language model, LoRA with dropout, accumulation 2": lambda folder: language_model(
        folder,
        "trainer.gradient_accumulation_steps=2",
        model={"lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1}},
    ),
    "language model, bf16": lambda folder: language_model(folder, "trainer.precision=bf16"),
    "language model, muon, tied words": lambda folder: language_model(
        folder, optim=MUON, model={"sizes": {**llm_runs.SIZES, "tie_word_embeddings": True}}
    ),
    "language model, 2 processes": lambda folder: language_model(
        folder, processes=2, model=PLAIN_LORA
    ),
    "language model, ZeRO-2, 2 processes": lambda folder: language_model(
        folder, "deepspeed=stage2_bf16", "trainer.timeout_minutes=10", processes=2, model=PLAIN_LORA
    ),
    "tokenizer, stage 1": lambda folder: tokenizer(folder, "stage1", "stage1"),
    "tokenizer, stage 2": lambda folder: tokenizer(
        folder,
        "stage2",
        "stage2",
        "model.load_pretrained=False",
        "model.restart_every=6",
        f"model.clip_model={vision_encoder(folder / 'vision')}",
    ),
    "SEED-1's tokenizer, stage 2": seed1_tokenizer,
}
CASES: dict[str, dict[str, Callable[[Path], Any]]] = {
    "pairs": {case: partial(pair_digests, case) for case in PAIRS},
    "rows": {case: partial(row_digests, case) for case in ROWS},
    "losses": LOSSES,
}
