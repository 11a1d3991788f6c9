"""The original interfaces SeedLlamaTokenizer and Seed1, on recorded strings and tiny random
weights.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from repository import ROOT

from seed_multimodal.compat.seed_llama import Seed1, SeedLlamaTokenizer
from seed_multimodal.config import instantiate
from seed_multimodal.errors import CheckpointError, CodesError, ConfigError
from seed_multimodal.images.transforms import seed_image_processor
from seed_multimodal.language.tokenizer import MultimodalTokenizer

GOLDEN = ROOT / "tests" / "golden" / "data" / "llm_sequences"


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> SeedLlamaTokenizer:
    return SeedLlamaTokenizer.from_pretrained(tiny_folder / "seed_tokenizer", device="cpu")


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image, dtype=np.int32) for image in images])


# ---- SeedLlamaTokenizer


def test_call_tokenizes_as_recorded(tokenizer):
    """`tokenization.json` was recorded from the original's slow LLaMA tokenizer."""
    recorded = json.loads((GOLDEN / "tokenization.json").read_text())
    tokenizer = SeedLlamaTokenizer(
        MultimodalTokenizer.from_pretrained(GOLDEN / "tokenizer"), tokenizer.images
    )
    assert (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
        tokenizer.unk_token_id,
        len(tokenizer),
    ) == tuple(recorded[name] for name in ("bos", "eos", "pad", "unk", "length"))
    assert tokenizer.num_image_tokens == 8192
    for case in recorded["cases"]:
        assert tokenizer(case["text"], add_special_tokens=False).input_ids == case["ids"], case
        assert tokenizer(case["text"], return_tensors="pt").input_ids.tolist() == [
            case["ids_with_special_tokens"]
        ]
        assert tokenizer.encode(case["text"]) == case["ids_with_special_tokens"]
        assert tokenizer.decode(torch.tensor(case["ids"])) == case["decoded"]


def test_encode_image_of_files_images_and_pixels(tokenizer, folder):
    image = Image.open(folder / "0.png")
    tensor = seed_image_processor(32)(image)
    codes = tokenizer.encode_image(image_torch=tensor)
    assert codes.shape == (1, 32) and torch.equal(codes, tokenizer.images.model.encode(tensor))
    for source in (
        {"image_path": folder / "0.png"},
        {"image_path": str(folder / "0.png")},
        {"image_pil": image},
    ):
        assert torch.equal(tokenizer.encode_image(**source), codes)
    assert torch.equal(
        tokenizer.encode_image(image_torch=torch.stack([tensor, tensor])), codes.expand(2, -1)
    )
    with pytest.raises(ConfigError, match="exactly one of image_path, image_pil and image_torch"):
        tokenizer.encode_image()


def test_decode_image_with_negatives(tokenizer):
    codes, negatives = torch.randint(0, 16, (2, 3, 32), generator=torch.Generator().manual_seed(0))
    plain = pixels(tokenizer.decode_image(codes))
    assert plain.shape == (3, 16, 16, 3)
    assert np.allclose(
        pixels(tokenizer.decode_image(codes[0].tolist())), plain[:1], atol=1
    )  # rounded alike or not
    options = {"guidance_scale": 5.0, "num_inference_steps": 3}
    separate = pixels(tokenizer.decode_image(codes, negatives, **options))
    shared = pixels(tokenizer.decode_image(codes, negative_indices=negatives[:1], **options))
    assert np.allclose(shared[0], separate[0], atol=1) and not np.array_equal(
        shared[1:], separate[1:]
    )
    assert not np.array_equal(pixels(tokenizer.decode_image(codes, negatives)), plain)


def test_tokenizer_has_what_a_llama_tokenizer_has(tokenizer, tmp_path):
    """Names and results of transformers' `LlamaTokenizer`, which the original's class extends."""
    texts = ["hello", "USER: What is this?<img>"]
    rows = [tokenizer(text).input_ids for text in texts]
    assert len(rows[0]) < len(rows[1])
    with pytest.raises(ConfigError, match="padding=True"):
        tokenizer(texts, return_tensors="pt")
    padded = tokenizer(texts, padding=True, return_tensors="pt")
    assert padded.input_ids.shape == padded.attention_mask.shape == (2, len(rows[1]))
    assert padded.input_ids[0].tolist() == rows[0] + [0] * (len(rows[1]) - len(rows[0]))
    assert padded.attention_mask.sum(1).tolist() == list(map(len, rows))
    cut = tokenizer(texts, padding="max_length", truncation=True, max_length=3, return_tensors="pt")
    assert cut.input_ids.tolist() == [(row + [0, 0])[:3] for row in rows]
    tokenizer.padding_side = "left"
    assert tokenizer.pad([{"input_ids": row} for row in rows]).attention_mask[0][0] == 0
    del tokenizer.padding_side

    assert tokenizer.batch_decode(rows, skip_special_tokens=True) == [
        "hello",
        "USER: What is this? <img>",
    ]
    tokens = ["<img>", "</s>", "<img_00003>", "no such token"]
    ids = tokenizer.convert_tokens_to_ids(tokens)
    assert (
        tokenizer.convert_tokens_to_ids("<img>")
        == ids[0]
        == tokenizer.encode("<img>", add_special_tokens=False)[0]
    )
    assert ids[1:] == [2, tokenizer.vocab_size + 3, 0]
    assert (
        tokenizer.convert_ids_to_tokens(ids[:3]) == tokens[:3]
        and tokenizer.get_vocab()["<img>"] == ids[0]
    )
    assert tokenizer.all_special_ids == [0, 1, 2] and tokenizer.tokenize("</s><img>") == [
        "</s>",
        "<img>",
    ]
    files = tokenizer.save_pretrained(tmp_path / "saved")
    assert (
        MultimodalTokenizer.from_pretrained(tmp_path / "saved").encode(texts[1], add_bos=True)
        == rows[1]
    )
    assert all(Path(file).is_file() for file in files)


def test_tokenizer_has_an_image_tokenizer(tokenizer):
    part = tokenizer.image_tokenizer
    assert tokenizer.to("cpu") is tokenizer and part.device == tokenizer.device == torch.device(
        "cpu"
    )
    assert (
        isinstance(part.model.visual_encoder, torch.nn.Module)
        and len(part) == tokenizer.num_image_tokens
    )
    pixels = part.processor(Image.effect_noise((40, 30), 90))
    codes = part.encode(pixels)
    assert torch.equal(codes, tokenizer.encode_image(image_torch=pixels))
    assert pixels_equal(part.decode(codes), tokenizer.decode_image(codes))


def pixels_equal(images: list[Image.Image], others: list[Image.Image]) -> bool:
    return np.array_equal(pixels(images), pixels(others))


@pytest.mark.parametrize(
    ("lines", "dtype", "fp16"),
    [
        ("", torch.float32, True),
        ("fp16: True\ndtype: float16", torch.float16, True),
        ("fp16: False\ndtype: bf16", torch.bfloat16, False),
    ],
)
def test_instantiate_a_yaml_file(tiny_folder, tmp_path, lines, dtype, fp16):
    file = tmp_path / "words.yaml"
    file.write_text(
        "_target_: models.seed_llama_tokenizer.SeedLlamaTokenizer.from_pretrained\n"
        f"pretrained_model_name_or_path: {tiny_folder}/seed_tokenizer\nload_diffusion: True\n"
        f"{lines}\n"
    )
    tokenizer = instantiate(file, device="cpu")
    assert isinstance(tokenizer, SeedLlamaTokenizer) and tokenizer.fp16 is fp16
    assert tokenizer.images.model.dtype == tokenizer.images.decoder.unet.dtype == dtype


# ---- Seed1


def test_seed1_tokenize_draw_and_reconstruct(folder):
    images = sorted(folder.glob("*.png"))
    model = Seed1.from_pretrained(folder, device="cpu", log=None)
    codes = model.tokenize(images)
    tensors = torch.stack(
        [seed_image_processor(16)(Image.open(image).convert("RGB")) for image in images]
    )
    assert codes.shape == (3, 32) and torch.equal(codes, model.tokenizer.encode(tensors))
    reconstructed = pixels(model.reconstruct(images, num_inference_steps=3))
    again = pixels(model.draw(codes, num_inference_steps=3, batch_size=2))
    assert reconstructed.shape == (3, 16, 16, 3) and np.abs(reconstructed - again).max() <= 1
    first, second = pixels(model.draw(codes[[0, 0]], seed=[1, 2], num_inference_steps=3))
    assert np.abs(first - second).max() > 5
    built = instantiate(
        ROOT / "configs" / "tokenizer" / "seed1.yaml",
        folder=str(folder),
        device="cpu",
        diffusion=str(folder / "stable-diffusion-v1-4"),
    )
    assert torch.equal(built.tokenize(images), codes)


def test_seed1_with_wrong_codes_or_without_weights(folder, tmp_path):
    with pytest.raises(CodesError, match="outside"):
        Seed1.from_pretrained(folder, device="cpu", log=None).draw([[50] * 32])
    with pytest.raises(
        CheckpointError, match=r"causal_qformer\.pth .*, and put Stable Diffusion 1.4 there"
    ):
        Seed1.from_pretrained(tmp_path / "nowhere", diffusion=tmp_path / "no-sd", log=None)
