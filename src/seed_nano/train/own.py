"""A system of one's own images and conversations, tuned from a shipped nano (`seed init --like
nano`).

nano's codes name its own things: a robot becomes the dress or the tree that it resembles. So stage
`images` tunes all of the way from an image to a picture at once: vision encoder, Q-Former,
codebook, decode head and layout decoder learn to draw the images, and to say the words of their
captions. The U-Net and the autoencoder stay. Stage `sft` tunes the language model on the new codes.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from seed_multimodal.data.formats.bad_records import RECORD_FAULTS, broken_note
from seed_multimodal.data.formats.conversations import conversation
from seed_multimodal.data.formats.images import record_image
from seed_multimodal.data.formats.pairs import Pairs, no_caption
from seed_multimodal.data.formats.record import BadRecord, Record
from seed_multimodal.data.formats.records import open_records
from seed_multimodal.diffusion.base import Detokenizer
from seed_multimodal.diffusion.networks import encode_moments
from seed_multimodal.disk import JsonObject, replace_json, replace_text
from seed_multimodal.errors import ConfigError, DataError, ImageError
from seed_multimodal.images.io import open_image
from seed_multimodal.images.transforms import normalise
from seed_multimodal.models.seed.modeling import Seed2Tokenizer
from seed_multimodal.models.seed.spec import SeedLlamaConfig
from seed_multimodal.pipelines.assemble import write_hub_files
from seed_multimodal.pipelines.config import SYSTEM, SystemConfig
from seed_nano.layout import LAYOUT, LayoutDecoder
from seed_nano.train.assemble import copy_llm, system_settings, trained_folder
from seed_nano.train.task import Loss, NanoTask, to_signed
from seed_nano.train.workspace import ROOT, Settings, Workspace, resolve_path

# The vision encoder of before: an evaluation would take its embeddings for the tuned one's targets.
OUTDATED = shutil.ignore_patterns("image_encoder", "model_index.json")
MAX_RATIO = 3  # of an image's sides, from which on it is hardly recognised as a square
LARGEST = 256  # pixels a side of the copied images
# Of a view: its scale, and how far it is shifted, in shares of the image.
SCALES, SHIFT = (0.88, 1.1), 0.06
WORDS_WEIGHT = 2.0  # of the words in a caption, against the picture
LEAST = {"held_out": 2, "views": 1}  # of settings
FEW, RARE = 20, 3  # images, and captions with a word, below which a warning is printed
ENCODER = "extract_image_ids_to_torchdata_parallel_chat.py"
DESCRIBING = ("What is in this picture?", "What do you see?", "Describe the picture.")
DRAWING = ("Draw {}.", "Please draw {}.", "{}")


class OwnWorkspace(Workspace):
    """A run that tunes a nano."""

    system = "own"

    def __init__(self, config: Settings, work: Path, out: Path) -> None:
        super().__init__(config, work, out)
        for name, least in LEAST.items():
            if getattr(config, name) < least:
                raise ConfigError(f"{name}: must be {least} or more, not {getattr(config, name)}.")
        # New and changed files are noticed by the stages' records.
        files = filter(None, (config.data, config.chats))
        config.data_state = " ".join(str(open_records(file).checksum) for file in files)

    @property
    def start(self) -> Path:
        """The system that is tuned."""
        return resolve_path(self.config.start)

    @property
    def name(self) -> str:
        """Of the data, in logs."""
        return Path(self.config.data).stem

    @cached_property
    def folders(self) -> dict[str, str]:
        paths = {"work": self.work, "out": self.out, "words": self.tokenizer_folder}
        paths |= {"shipped": self.start, "decoder": self.decoder_folder}
        return {"name": self.name, **{key: str(path.absolute()) for key, path in paths.items()}}

    def images(self, part: str) -> list[JsonObject]:
        """`image` and `caption` of the learned or held-out images ("learned", "held_out")."""
        rows: list[JsonObject] = json.loads((self.work / "data" / f"{part}.json").read_text())
        return rows


# ---- stage `data`


def write_data(space: OwnWorkspace) -> JsonObject:
    """Stage `data`: copies of the images, divided into learned and held-out ones, conversations,
    and what the system begins with; says what may be too little."""
    folder = space.work / "data"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "images").mkdir(parents=True)

    # 1. The images.
    pairs = Pairs(space.config.data)
    parts: dict[str, list[JsonObject]] = {"learned": [], "held_out": []}
    # By content, so that copies of an image are in one part, wherever they lie.
    part_of: dict[bytes, str] = {}
    copies: dict[bytes, str] = {}  # their files
    narrow = []
    order = random.Random(0).sample(range(len(pairs)), len(pairs))
    for index in order:
        try:
            pair = pairs.read(index)
            image = open_image(pair.image).image
            if not pair.captions:
                raise no_caption(pair)
        except RECORD_FAULTS as error:
            print(f"[data] left out: {pairs.broken(index, error).location}", flush=True)
            continue
        if max(image.size) > MAX_RATIO * min(image.size):
            narrow.append(pair.location)
        digest = scaled_digest(image)
        file = folder / "images" / f"{index:06d}.png"
        image.save(file)
        part = "held_out" if len(part_of) % space.config.held_out == 0 else "learned"
        part = part_of.setdefault(digest, part)
        copies.setdefault(digest, str(file))
        parts[part].append({"image": str(file), "caption": pair.captions})
    if not parts["learned"]:
        raise DataError(f"{space.config.data}: {len(pairs)} images, of which none can be learned.")
    for name, rows in parts.items():
        replace_text(folder / f"{name}.json", json.dumps(rows, indent=1))
    if narrow:
        said = f"more than {MAX_RATIO} times as wide as high, or the reverse, which become squares"
        print(f"[data] {len(narrow)} images are {said}: {', '.join(narrow[:3])} …", flush=True)
    for line in warnings(parts["learned"]):
        print(f"[data] {line}", flush=True)

    # 2. The conversations without held-out images, and requests made of captions.
    held_out = {row["image"] for row in parts["held_out"]}
    chats = own_chats(space, copies, held_out)
    made = caption_chats(parts["learned"], SystemConfig.read(space.start).tasks)
    lines = [json.dumps(row) + "\n" for row in chats + made]
    replace_text(folder / "chats.jsonl", "".join(lines))

    # 3. What the system begins with; changed data leave trained parts as they are.
    for name in (space.tokenizer_name, "seed_llama"):
        if not (space.out / name).exists():
            shutil.copytree(space.start / name, space.out / name, ignore=OUTDATED)
    replace_json(space.out / SYSTEM, system_settings(space))
    write_hub_files(SeedLlamaConfig, space.out)
    counts = {name: len(rows) for name, rows in parts.items()}
    print(f"[data] {counts}, {len(chats)} conversations", flush=True)
    return {**counts, "chats": len(chats)}


def warnings(rows: Sequence[JsonObject]) -> list[str]:
    """What is too little to be learned."""
    lines = []
    if len(rows) < FEW:
        lines.append(f"only {len(rows)} images are learned; from about 50 on the system is useful.")
    counts = Counter(word for row in rows for word in caption_words(row))
    rare = sorted(word for word, count in counts.items() if count < RARE)
    if rare:
        named = ", ".join(rare[:8])
        lines.append(f"{len(rare)} words are in fewer than {RARE} captions ({named} …).")
    return lines


def caption_words(row: JsonObject) -> set[str]:
    """The words of an image's captions."""
    return {word.strip(".,;:!?").lower() for text in row["caption"] for word in text.split()}


def scaled_digest(image: Image.Image) -> bytes:
    """Scale an image to at most `LARGEST` pixels, in place; returns its digest."""
    image.thumbnail((LARGEST, LARGEST))
    return hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()


def own_chats(
    space: OwnWorkspace, copies: Mapping[bytes, str], held_out: set[str]
) -> list[JsonObject]:
    """The user's conversations about other than held-out images, which have the copies' paths."""
    if not space.config.chats:
        return []
    records = open_records(space.config.chats)
    chats = []
    n_held_out = 0
    for index in range(len(records)):
        location = records.locate(index).location
        try:
            record = records.locate(index).parsed()
            fields = conversation(record.fields, location)
            messages = fields["messages"]
            images = [part for turn in messages for part in turn["content"] if "image" in part]
            for part in images:
                part["image"] = copied(part["image"], record, space.config.data, copies)
        except RECORD_FAULTS as error:
            print(f"[data] left out: {broken_note(error, location).location}", flush=True)
            continue
        if any(part["image"] in held_out for part in images):
            n_held_out += 1
        else:
            system = {"system": fields["system"]} if fields.get("system") else {}
            chats.append({**system, "messages": messages})
    print(f"[data] left out: {n_held_out} conversations about held-out images", flush=True)
    return chats


def copied(value: object, record: Record, data: str, copies: Mapping[bytes, str]) -> str:
    """The path of the copy of an image of a conversation, or its own.

    It counts from the conversations' file, else from the folder of the images.
    """
    try:
        path = record_image(value, record, None)
    except ImageError:
        path = record_image(value, record, data)
    if not isinstance(path, Path):
        raise BadRecord("no file", f"{record.location}: its image is no file.")
    digest = scaled_digest(open_image(path).image)
    return copies.get(digest, str(path.resolve()))


def caption_chats(rows: Sequence[JsonObject], tasks: Any) -> list[JsonObject]:
    """Requests to describe each image, and to draw it."""
    chats = []
    for row in rows:
        image = {"image": row["image"]}
        for caption in row["caption"]:
            caption = caption.strip().rstrip(".")
            answer = f"{caption[:1].upper()}{caption[1:]}."
            for request in (tasks.describe, *DESCRIBING):
                chats.append(turns([image, request], [answer]))
            requests = [tasks.draw_request(caption), *(text.format(caption) for text in DRAWING)]
            for request in requests:
                chats.append(turns([request], [image]))
    return chats


def turns(request: list[object], answer: list[object]) -> JsonObject:
    """A conversation of one request."""
    messages = [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]
    return {"messages": messages}


# ---- stage `images`


class OwnImagesTask(NanoTask):
    """Goes to `{tokenizer}` and `{decoder}/layout`."""

    def __init__(self, space: OwnWorkspace) -> None:
        torch.manual_seed(space.config.seed)
        shipped = space.start / space.tokenizer_name
        self.vae = Detokenizer.load_part(space.start / space.decoder_name, "vae").to(space.device)
        tokenizer = Seed2Tokenizer.from_pretrained(shipped)
        layout = LayoutDecoder.from_pretrained(space.start / space.decoder_name / LAYOUT)

        # 1. The images, and the words of their captions.
        rows = space.images("learned")
        self.pictures = [Image.open(row["image"]).convert("RGB") for row in rows]
        words = sorted({word for row in rows for word in caption_words(row)})
        self.words = torch.zeros(len(rows), len(words))
        for index, row in enumerate(rows):
            for word in caption_words(row):
                self.words[index, words.index(word)] = 1

        # 2. The networks.
        reader = nn.Linear(tokenizer.config.image_features_dim, len(words))
        parts = {"tokenizer": tokenizer, "layout": layout, "reader": reader}
        networks = nn.ModuleDict(parts).requires_grad_(True).train()
        super().__init__(space, "images", networks)

    def batch(self, micro_step: int) -> tuple[Tensor, Tensor]:
        """Views uint8 `[B, 3, S, S]`, and which words their captions have `[B, W]`."""
        rows = self.indices(micro_step, len(self.pictures))
        size = self.space.config.image_size
        views = []
        for position, row in enumerate(rows):
            rng = random.Random(f"{self.space.config.seed} {micro_step} {position}")
            views.append(np.asarray(view_of(self.pictures[row], size, rng)))
        pixels = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2)
        return pixels.to(self.space.device), self.words[rows].to(self.space.device)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Loss:
        pixels, words = batch
        tokenizer: Any = self.module["tokenizer"]
        # 1. Codes, with the gradient of what is decoded from them.
        tokenizer.quantize.update()
        rows, commitment, _ = tokenizer.quantize(tokenizer.pre_quant(normalise(pixels)))
        decoded = tokenizer.decoder_tokens(tokenizer.decode_task_layer(rows))
        embedding = tokenizer.project(decoded)
        # 2. The image's latents, and its words, from the embedding.
        with torch.no_grad():
            wanted = encode_moments(self.vae, to_signed(pixels)).chunk(2, dim=1)[0]
        picture = F.mse_loss(self.module["layout"](embedding)[0].float(), wanted.float())
        said = self.module["reader"](embedding).float()
        naming = F.binary_cross_entropy_with_logits(said, words)
        right = ((said > 0) == (words > 0)).all(1).float().mean()
        metrics = {"picture": picture.detach(), "words": right}
        return picture + WORDS_WEIGHT * naming + commitment, metrics

    def save_result(self) -> None:
        self.module.cpu().half()
        parts: Any = self.module
        parts["tokenizer"].save_pretrained(self.space.tokenizer_folder)
        parts["layout"].save_pretrained(self.space.decoder_folder / LAYOUT)


def view_of(image: Image.Image, size: int, rng: random.Random) -> Image.Image:
    """A slightly scaled and shifted view; what is outside of the image has its corner's colour."""
    scale = 1 / rng.uniform(*SCALES)
    # The middle stays, but for a shift.
    left, top = [
        side * ((1 - scale) / 2 + rng.uniform(-SHIFT, SHIFT))
        for side in (image.width, image.height)
    ]
    matrix = (scale, 0, left, 0, scale, top)
    corner = image.getpixel((0, 0))
    bilinear = Image.Resampling.BILINEAR
    view = image.transform(
        image.size, Image.Transform.AFFINE, matrix, resample=bilinear, fillcolor=corner
    )
    return view.resize((size, size), Image.Resampling.BICUBIC)


# ---- stages `codes`, `llm`


def encode_chats(space: OwnWorkspace) -> None:
    """Stage `codes`: the conversations with the codes of several views of each image, anew."""
    folder = space.work / "codes"
    shutil.rmtree(folder, ignore_errors=True)
    application = ROOT / "MultiModalLLM"
    command: list[Any] = [sys.executable, application / "src/tools" / ENCODER, "--num_workers", 0]
    command += ["--tokenizer", space.tokenizer_folder, "--views", space.config.views]
    command += ["--image_transform", application / "configs/processer/nano_transform.yaml"]
    command += ["--data", space.work / "data/chats.jsonl", "--save_dir", folder]
    subprocess.run([*map(str, command)], check=True)


def install_own_llm(space: OwnWorkspace) -> None:
    """The tuned language model into the system."""
    copy_llm(trained_folder(space, "sft"), space.out / "seed_llama")
