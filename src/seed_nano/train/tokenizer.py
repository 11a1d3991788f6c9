"""nano's SEED-2 tokenizer: its sizes, the join of both LAVIS stages, codes of scenes, records of
codes and a start for the LLM."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from seed_multimodal.data.formats.shards import write_shard
from seed_multimodal.images.transforms import normalise
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.language.vocabulary import ImageVocabulary
from seed_multimodal.models.seed.configuration import QFormerConfig, Seed2Config
from seed_multimodal.models.seed.modeling import Seed2Tokenizer
from seed_multimodal.nn.vision.eva import EvaConfig
from seed_multimodal.recipes.seed.export import export_tokenizer
from seed_multimodal.state_dicts import load_state_dict
from seed_multimodal.training.llm.config import LlmModelSettings
from seed_multimodal.training.llm.model import build_llm, save_llm_weights
from seed_nano.train.task import map_scenes
from seed_nano.train.workspace import Settings, Workspace, codebook_sections
from seed_nano.world.records import Record, record_at, scenes_of, with_images
from seed_nano.world.scene import Scene

CHECKPOINT = "checkpoint_0.pth"  # a LAVIS stage is one epoch
# Of the records of a kind; they are made of scenes of the val split, for the held-out loss.
HELD_OUT_SHARE = 0.02


def tokenizer_config(config: Settings) -> Seed2Config:
    """The SEED-2 configuration at nano size; its vision encoder is that of stage `clip`."""
    sizes = config.tokenizer
    quantizer = config.quantizer
    vision = config.clip
    return Seed2Config(
        vit=EvaConfig(
            image_size=config.image_size,
            patch_size=vision.patch,
            width=vision.width,
            depth=vision.layers,
            heads=vision.heads,
            mlp_width=4 * vision.width,
            pre_norm=True,
        ),
        qformer=QFormerConfig(
            width=sizes.hidden,
            depth=sizes.layers,
            heads=sizes.heads,
            mlp_width=4 * sizes.hidden,
            max_positions=64,
            dropout=0.0,
            causal_queries=None if quantizer.causal else 0,
        ),
        num_query=quantizer.queries,
        codebook_size=sizes.codes,
        codebook_dim=sizes.code_dim,
        decode_depth=sizes.decode_depth,
        decode_heads=sizes.heads,
        recon_s=False,
        image_features_dim=vision.embedding,
        codebook_sections=codebook_sections(config),
        quantizer=quantizer.kind,
        fsq_levels=tuple(quantizer.levels),
    )


def join_stages(space: Workspace) -> None:
    """Stage `tokenizer`: write the system's tokenizer from both stages' checkpoints."""
    new = space.work / "tokenizer"
    export_tokenizer(
        space.work / "stage2" / CHECKPOINT,
        new,
        stage1=space.work / "stage1" / CHECKPOINT,
        vision=space.decoder_folder / "image_encoder",
        config=tokenizer_config(space.config),
        force=True,
    )
    space.tokenizer_folder.mkdir(parents=True, exist_ok=True)
    for name in ("model.safetensors", "config.json"):
        shutil.copy(new / name, space.tokenizer_folder)
    shutil.rmtree(new)


def load_tokenizer(space: Workspace) -> Seed2Tokenizer:
    """The finished tokenizer, on the device."""
    return Seed2Tokenizer.from_pretrained(space.tokenizer_folder).to(space.device)


def encode_scenes(space: Workspace, scenes: Sequence[Scene]) -> Tensor:
    """Codes int16 `[N, Q]` of scenes, computed in fp32 as in use."""
    tokenizer = load_tokenizer(space)
    return map_scenes(
        lambda images: tokenizer.encode(normalise(images)).to(torch.int16), scenes, space, batch=512
    )


def records(space: Workspace) -> dict[str, int]:
    """Stage `records`: the shards, and the language model that starts to learn them; returns how
    many training records each kind has."""
    config = space.config
    tokenizer = Seed2Tokenizer.read_config(space.tokenizer_folder / "config.json")
    write_initial_llm(space, tokenizer.codebook_sections)

    def encode(scenes: Sequence[Scene]) -> Tensor:
        make = partial(encode_scenes, space, scenes)
        facts = {"held_out_scenes": config.held_out_scenes, **asdict(config.records)}
        return space.cached("record_codes", "tokenizer", make, **facts)

    return write_records(space, encode)


def write_initial_llm(space: Workspace, sections: int) -> None:
    """Write `work/llm_start`: a LLaMA of random weights with the embeddings of
    `init_from_codebook`."""
    sizes = space.config.llm
    folder = space.tokenizer_folder
    tokenizer = MultimodalTokenizer.from_pretrained(folder)
    settings = LlmModelSettings(
        sizes={
            "hidden_size": sizes.width,
            "intermediate_size": sizes.ffn,
            "num_hidden_layers": sizes.layers,
            "num_attention_heads": sizes.heads,
            "max_position_embeddings": sizes.positions,
            "tie_word_embeddings": True,
            "rms_norm_eps": 1.0e-5,
        },
        seed=space.config.seed + 5,
    )
    llama = build_llm(settings, tokenizer, "cpu")
    codebook = load_state_dict(folder / "model.safetensors")["quantize.embedding.weight"]
    init_from_codebook(llama, codebook, sections, tokenizer.vocabulary)
    save_llm_weights(llama, space.work / "llm_start")


@torch.no_grad()
def init_from_codebook(
    llama: Any, codebook: Tensor, sections: int, vocabulary: ImageVocabulary
) -> None:
    """Initialize token embeddings of codes by a fixed random projection of the codebook, scaled as
    random embeddings, so that similar codes have similar embeddings. Each section has its own
    projection."""
    embeddings = llama.model.embed_tokens.weight
    parts = codebook.float().reshape(sections, -1, codebook.shape[1])
    projection = torch.randn(
        sections, codebook.shape[1], embeddings.shape[1], generator=torch.Generator().manual_seed(0)
    )
    projected = ((parts - parts.mean(1, keepdim=True)) @ projection).flatten(0, 1)
    if (spread := projected.std()) > 0:  # sections of a single code have no neighbours
        scaled = projected * (embeddings[: vocabulary.n_text].std().float().cpu() / spread)
        embeddings[vocabulary.n_text : vocabulary.n_text + vocabulary.n_codes] = scaled.to(
            embeddings
        )


def write_records(space: Workspace, encode: Callable[[Sequence[Scene]], Tensor]) -> dict[str, int]:
    """Write `work/records/SPLIT/KIND.tar`; returns the number of images and of records by kind.

    encode: N scenes → codes int16 `[N, Q]`.
    """
    config = space.config
    # Kinds of records with the number 0 have no file.
    amounts = {kind: amount for kind, amount in asdict(config.records).items() if amount}

    # 1. All records, with scenes in place of images, and each scene once.
    records_of: dict[tuple[str, str], list[Record]] = {}
    scenes: dict[Scene, None] = {}
    for split, pool in (("train", config.pool), ("val", config.held_out_scenes)):
        for kind, amount in amounts.items():
            count = amount if split == "train" else max(1, round(amount * HELD_OUT_SHARE))
            records = [
                record_at(kind, config.seed, index, split, pool, space.names)
                for index in range(count)
            ]
            records_of[split, kind] = records
            for record in records:
                scenes |= dict.fromkeys(scenes_of(record))

    # 2. The codes of each scene, which is encoded once however often it occurs.
    codes = dict(zip(scenes, encode(list(scenes)).tolist(), strict=True))

    def image_part(scene: Scene) -> dict[str, list[int]]:
        return {"codes": codes[scene]}

    def samples(kind: str, records: Sequence[Record]) -> Iterator[tuple[str, dict[str, bytes]]]:
        for index, record in enumerate(records):
            convert = image_part if "messages" in record else codes.__getitem__
            content = json.dumps(with_images(record, convert), separators=(",", ":"))
            yield f"{kind}-{index:06d}", {"json": content.encode()}

    # 3. A shard for each split and kind.
    for (split, kind), records in records_of.items():
        file = space.work.absolute() / "records" / split / f"{kind}.tar"
        write_shard(file, samples(kind, records))
    return {"images": len(scenes), **amounts}
