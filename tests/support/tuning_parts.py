"""A tiny SEED-X with images in all data formats, for tests of its instruction tuning."""

import torch
from data_files import lines
from llm_runs import COLOURS, OPTIM, SIZES, TRAINER, data_in, merged, write_llama
from PIL import Image
from tiny.seed_x import READS, TOWER, WRITES, write_seed_x_tokenizer
from yaml_tables import read_tables

from seed_multimodal.data.formats.shards import write_shard
from seed_multimodal.images.io import image_to_bytes
from seed_multimodal.nn.vision.qwen import QwenVit

RESAMPLERS = {"input_resampler": vars(READS), "output_resampler": vars(WRITES)}
TABLES = read_tables(__file__)
LORA = TABLES["lora"]


def jpeg(colour: tuple[int, int, int], size: tuple[int, int] = (40, 30)) -> bytes:
    """A plain image."""
    return image_to_bytes(Image.new("RGB", size, colour), "JPEG")


def write_parts(folder):
    """Tokenizer, vision encoder, language model and data in `folder`."""
    tokenizer = write_seed_x_tokenizer(folder / "tokenizer")
    torch.manual_seed(0)
    QwenVit(TOWER).save_pretrained(folder / "vision")
    write_llama(folder / "llm", len(tokenizer))
    write_data(folder)


def write_data(folder):
    """Conversations, edits of one and of several turns as jsonl with a folder of images; captions
    in a tar."""
    images = folder / "pictures"
    images.mkdir()
    names = list(COLOURS)
    # One wide image, which is cut into two views.
    for name in names:
        (images / f"{name}.jpg").write_bytes(
            jpeg(COLOURS[name], (90, 30) if name == "blue" else (40, 30))
        )
    for name in ("talks", "edits", "turns"):
        lines(folder / f"{name}.jsonl", TABLES[name])
    # Captions; every second one has a measured similarity.
    similar = {"json": b'{"similarity": 0.9}'}
    write_shard(
        folder / "captions.tar",
        (
            (
                name,
                {
                    "jpg": jpeg(COLOURS[name]),
                    "txt": f"a {name} picture".encode(),
                    **(similar if index % 2 else {}),
                },
            )
            for index, name in enumerate(names)
        ),
    )


def data_of(folder, **changes) -> dict:
    """A mixture of all four."""
    return {**data_in(folder, TABLES["data"]), **changes}


def config_of(
    folder,
    output,
    *,
    data: dict | None = None,
    lora: bool = False,
    **changes: dict,
) -> dict:
    """A whole configuration; `changes` are merged into its groups."""
    # LoRA on the language model in files, or all weights of a new one.
    model = (
        {"path": str(folder / "llm"), "lora": LORA, "train_embeddings": True}
        if lora
        else {"sizes": SIZES, "dtype": "fp32"}
    )
    return merged(
        {
            "output_dir": str(output),
            "tokenizer": {"pretrained_model_name_or_path": str(folder / "tokenizer")},
            "data": data or data_of(folder),
            "model": model,
            "trainer": TRAINER,
            "agent": RESAMPLERS,
            "visual_encoder": {"path": str(folder / "vision")},
            "optim": OPTIM,
        },
        changes,
    )
