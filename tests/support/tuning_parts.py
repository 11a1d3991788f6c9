"""A tiny SEED-X with images in all data formats, for tests of its instruction tuning."""

import torch
from data_files import lines
from llm_runs import COLOURS, OPTIM, SIZES, TRAINER, merged, write_llama
from PIL import Image
from tiny.seed_x import READS, TOWER, VIEW, WRITES, write_seed_x_tokenizer

from seed_multimodal.data.formats.shards import write_shard
from seed_multimodal.images.io import image_to_bytes
from seed_multimodal.nn.vision.qwen import QwenVit

RESAMPLERS = {"input_resampler": vars(READS), "output_resampler": vars(WRITES)}
LORA = {
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.1,
    "modules_to_save": ["input_layernorm", "post_attention_layernorm", "norm"],
}
VIEWS = {"base_resolution": VIEW, "resolution_grids": ["1x1", "2x1"]}


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
    # Conversations over one image, and over none.
    talks = [
        {"image": f"/{name}.jpg", "data": ["What is it?", f"It is {name}.", "Where?", "Here."]}
        for name in names
    ]
    talks.append({"image": None, "data": ["Say red.", "Red."]})
    # Edits: from one image to another, and of the same image twice.
    edits = [
        {
            "source_image": "grey.jpg",
            "target_image": f"{name}.jpg",
            "instruction": f"Make it {name}.",
        }
        for name in names
    ]
    turns = [
        {
            "messages": [
                {"role": "user", "content": [{"image": "grey.jpg"}, f"Make it {first}."]},
                {"role": "assistant", "content": ["Here.", {"image": f"{first}.jpg"}]},
                {"role": "user", "content": [f"Make it {second}."]},
                {"role": "assistant", "content": [{"image": f"{second}.jpg"}]},
            ]
        }
        for first, second in zip(names, names[1:] + names[:1], strict=True)
    ]
    for name, records in (("talks", talks), ("edits", edits), ("turns", turns)):
        lines(folder / f"{name}.jsonl", records)
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
    images = str(folder / "pictures")

    def source(name, file: str, **options) -> dict:
        return {
            "name": name,
            "files": str(folder / file),
            "decoder": f"seed_x.{name}",
            "image_dir": images,
            "options": {**VIEWS, **options},
            "batch_size": 2,
            "max_length": 160,
        }

    return {
        "sources": [
            source("conversation", "talks.jsonl"),
            source("caption", "captions.tar", img_first_ratio=-1, add_gen_prompt=True),
            source("edit", "edits.jsonl", resolution_grids=["1x1"]),
            source("chat", "turns.jsonl"),
        ],
        "packing": False,
        "length": 200,
        "rows": 2,
        "seed": 3,
        **changes,
    }


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
