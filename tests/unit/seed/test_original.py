"""The original interfaces SeedLlamaTokenizer and Seed1 on tiny random weights (its tokenization of
texts: golden `llm_sequences`)."""

import numpy as np
import pytest
import torch
from PIL import Image
from repository import ROOT

from seed_multimodal.compat.seed_llama import Seed1, SeedLlamaTokenizer
from seed_multimodal.config import instantiate
from seed_multimodal.errors import CodesError, ConfigError
from seed_multimodal.images.transforms import seed_image_processor


@pytest.fixture(scope="module")
def tokenizer(tiny_folder):
    return SeedLlamaTokenizer.from_pretrained(tiny_folder / "seed_tokenizer", device="cpu")


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image, dtype=np.int32) for image in images])


# ---- SeedLlamaTokenizer


def test_encode_image_of_files_images_and_pixels(tokenizer, folder):
    # The arguments of the original's method, of which exactly one is given.
    file = folder / "0.png"
    image = Image.open(file)
    tensor = seed_image_processor(32)(image)
    codes = tokenizer.images.model.encode(tensor)
    for source in ({"image_path": str(file)}, {"image_pil": image}, {"image_torch": tensor}):
        assert torch.equal(tokenizer.encode_image(**source), codes)
    with pytest.raises(ConfigError, match="image_path"):
        tokenizer.encode_image()

    # As the original's `image_tokenizer`.
    part = tokenizer.image_tokenizer
    assert isinstance(part.model.visual_encoder, torch.nn.Module)
    assert len(part) == tokenizer.num_image_tokens
    assert part.device == tokenizer.to("cpu").device == torch.device("cpu")
    assert torch.equal(part.encode(part.processor(image)), codes)
    assert np.array_equal(pixels(part.decode(codes)), pixels(tokenizer.decode_image(codes)))


def test_decode_image_with_negatives(tokenizer):
    # As the original's `negative_indices`: of each image, or one for all.
    codes, negatives = torch.randint(0, 16, (2, 3, 32), generator=torch.Generator().manual_seed(0))
    assert pixels(tokenizer.decode_image(codes[0].tolist())).shape == (1, 16, 16, 3)
    options = {"guidance_scale": 5.0, "num_inference_steps": 3}
    separate = pixels(tokenizer.decode_image(codes, negatives, **options))
    shared = pixels(tokenizer.decode_image(codes, negative_indices=negatives[:1], **options))
    assert np.allclose(shared[0], separate[0], atol=1)
    assert not np.array_equal(shared[1:], separate[1:])


def test_tokenizer_has_what_a_llama_tokenizer_has(tokenizer):
    # Names and results of transformers' `LlamaTokenizer`, which the original's class extends.
    texts = ["hello", "USER: What is this?<img>"]
    short, long = (tokenizer(text).input_ids for text in texts)
    padding = [0] * (len(long) - len(short))
    padded = tokenizer(texts, padding=True, return_tensors="pt")
    assert padded.input_ids.tolist() == [short + padding, long]
    assert padded.attention_mask.sum(1).tolist() == [len(short), len(long)]
    cut = tokenizer(texts, padding="max_length", truncation=True, max_length=3)
    assert cut.input_ids == [(row + [0, 0])[:3] for row in (short, long)]

    decoded = tokenizer.batch_decode([short, long], skip_special_tokens=True)
    assert decoded == ["hello", "USER: What is this? <img>"]
    tokens = ["<img>", "</s>", "<img_00003>", "no such token"]
    ids = tokenizer.convert_tokens_to_ids(tokens)
    assert ids == [tokenizer.get_vocab()["<img>"], 2, tokenizer.vocab_size + 3, 0]
    assert tokenizer.convert_ids_to_tokens(ids[:3]) == tokens[:3]


# ---- Seed1


def test_seed1_tokenize_draw_and_reconstruct(folder):
    # One code path for files, codes and the YAML's object.
    images = sorted(folder.glob("*.png"))
    file = ROOT / "configs" / "tokenizer" / "seed1.yaml"
    diffusion = str(folder / "stable-diffusion-v1-4")
    built = instantiate(file, folder=str(folder), device="cpu", diffusion=diffusion)
    model = Seed1.from_pretrained(folder, device="cpu", log=None)
    codes = model.tokenize(images)
    assert torch.equal(built.tokenize(images), codes)
    options = {"num_inference_steps": 3}
    reconstructed = pixels(model.reconstruct(images, **options))
    again = pixels(model.draw(codes, batch_size=2, **options))
    assert np.abs(reconstructed - again).max() <= 1
    with pytest.raises(CodesError):
        model.draw([[50] * 32])
