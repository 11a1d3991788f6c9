"""A tiny LaVIT, pictures with captions, a record of codes and plain text, for the tests of its unified pre-training."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from seed_multimodal.language.llama import force_special_ids
from seed_multimodal.lavit.checkpoints import save_dynamic_tokenizer
from seed_multimodal.lavit.modeling import DynamicTokenizer, LavitTokenizerConfig
from seed_multimodal.lavit.processing import LavitTokenizer
from seed_multimodal.nn.eva import EvaConfig

SIDE, CODES, PATCHES = 16, 8, 16
SIZES = LavitTokenizerConfig(
    vit=EvaConfig(image_size=SIDE, patch_size=4, width=16, depth=1, heads=2, mlp_width=32), vit_head=0, merger_depth=2,
    merger_heads=2, merger_mlp_width=24, codebook_size=CODES, codebook_dim=4, llm_width=32)
LLAMA = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 256, "tie_word_embeddings": False}
TEXTS = ["a red picture a green picture a blue picture a grey picture What is red? plain words of no picture"] * 30
COLOURS = {"red": (200, 30, 30), "green": (30, 180, 40), "blue": (40, 60, 220), "grey": (120, 120, 120)}
VISUAL_RATES = {"causal_encoder": 2.0e-2, "vit_proj": 2.0e-2}
TRAINER = {"max_steps": 6, "precision": "fp32", "seed": 1, "dataloader_num_workers": 0, "logging_steps": 1,
           "report_to": [], "save_steps": 100, "device": "cpu", "timeout_minutes": 2}


def picture(colour: tuple[int, int, int], number: int = 0) -> bytes:
    """A plain picture with a spot."""
    image, stream = Image.new("RGB", (24, 20), colour), io.BytesIO()
    image.paste((255, 255, 255), (number % 4 * 5, 4, number % 4 * 5 + 6, 12))
    image.save(stream, "PNG")
    return stream.getvalue()


def write_parts(home: Path) -> None:
    """Tokenizers, language model and data below `home`."""
    words = LavitTokenizer.train(TEXTS, home / "words", vocab_size=300, n_codes=CODES, tokens_per_image=PATCHES)
    torch.manual_seed(0)
    model = DynamicTokenizer(SIZES)
    for one in model.parameters():
        if one.ndim >= 2:  # patches that differ
            torch.nn.init.normal_(one, std=0.3)
    save_dynamic_tokenizer(model, home / "visual")
    llm = LlamaForCausalLM(LlamaConfig(vocab_size=words.vocabulary.n_text, **LLAMA))
    force_special_ids(llm)
    llm.save_pretrained(home / "llm")
    with tarfile.open(home / "captions.tar", "w") as tar:
        for number, name in enumerate(COLOURS):
            for extension, data in (("png", picture(COLOURS[name], number)), ("txt", f"a {name} picture".encode())):
                info = tarfile.TarInfo(f"{number:04}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    records = {"words": [{"text": f"plain words of no picture, {name}"} for name in COLOURS],
               "codes": [{"text": f"a {name}", "image_ids": [number, 2, 5][:1 + number % 3]}
                         for number, name in enumerate(COLOURS)]}
    for name, lines in records.items():
        (home / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def data_of(home: Path, **changes: Any) -> dict[str, Any]:
    """The mixture: language to pictures as 2 to 1."""
    sources = [{"name": "captions", "files": str(home / "captions.tar"), "decoder": "lavit.caption", "weight": 0.8,
                "options": {"base_resolution": SIDE, "text_dropout": 0.2}},
               {"name": "codes", "files": str(home / "codes.jsonl"), "decoder": "lavit.caption", "weight": 0.2,
                "options": {"base_resolution": SIDE}},
               {"name": "words", "files": str(home / "words.jsonl"), "decoder": "pretrain.text", "weight": 2.0}]
    return {"sources": sources, "packing": True, "length": 96, "rows": 2, "seed": 3, **changes}


def config_of(home: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """A whole configuration; mappings in `changes` are merged into its groups."""
    groups = {"model": {"path": str(home / "llm"), "dtype": "fp32"}, "trainer": TRAINER, "data": data_of(home),
              "optim": {"learning_rate": 5.0e-3, "part_rates": VISUAL_RATES, "warmup_ratio": 0.1, "min_lr_ratio": 0.1},
              "visual_encoder": {"path": str(home / "visual")}}
    return {"output_dir": str(output), "tokenizer": str(home / "words"),
            **{name: {**values, **changes.get(name, {})} for name, values in groups.items()},
            **{name: values for name, values in changes.items() if name not in groups}}


def losses(output: Path) -> dict[int, float]:
    """Step → loss, of the log."""
    lines = [json.loads(line) for line in (output / "train.log.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}
