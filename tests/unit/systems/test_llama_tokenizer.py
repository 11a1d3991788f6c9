"""The original's tokenizer object: its members, results and defaults, on recorded strings and a tiny system."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_seed1
import torch
from PIL import Image

from seed_multimodal.config import instantiate
from seed_multimodal.device import RELEASED_FP16, _resolve_dtype
from seed_multimodal.errors import CodesError, ConfigError, ImageError
from seed_multimodal.images.transforms import seed_image_processor
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.seed.diffusion import StableDiffusionDetokenizer
from seed_multimodal.systems.llama_tokenizer import SeedLlamaTokenizer
from seed_multimodal.systems.seed1 import Seed1

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "data" / "llm_sequences"


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> SeedLlamaTokenizer:
    return SeedLlamaTokenizer.from_pretrained(tiny_folder / "seed_tokenizer", device="cpu")


@pytest.fixture()
def picture() -> Image.Image:
    return Image.fromarray((np.random.default_rng(1).random((40, 50, 3)) * 255).astype(np.uint8))


def same(a: list[Image.Image], b: list[Image.Image]) -> bool:
    return len(a) == len(b) and all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in zip(a, b, strict=True))


def test_words_are_those_recorded(tokenizer: SeedLlamaTokenizer) -> None:
    """`tokenization.json` was recorded from the slow LLaMA tokenizer that the original's object is."""
    recorded = json.loads((GOLDEN / "tokenization.json").read_text())
    words = SeedLlamaTokenizer(MultimodalTokenizer.from_pretrained(GOLDEN / "tokenizer"), tokenizer.pictures)
    assert (words.bos_token_id, words.eos_token_id, words.pad_token_id, words.unk_token_id, len(words)) == tuple(
        recorded[name] for name in ("bos", "eos", "pad", "unk", "length"))
    assert (words.bos_token, words.eos_token, words.pad_token) == ("<s>", "</s>", "<unk>")
    assert (words.padding_side, words.truncation_side) == (recorded["padding_side"], recorded["truncation_side"])
    assert words.num_image_tokens == 8192 and words.vocab_size == 32000
    names = ["<img_00000>", "<img>", "</img>", "no such word"]
    assert words.convert_tokens_to_ids(names) == [*(recorded[name] for name in (
        "first_image_id", "img_open", "img_close")), 0]
    assert words.convert_tokens_to_ids("</img>") == 40193
    assert words.convert_ids_to_tokens([40193, 1]) == ["</img>", "<s>"] and words.convert_ids_to_tokens(1) == "<s>"
    for case in recorded["cases"]:
        assert words(case["text"], add_special_tokens=False).input_ids == case["ids"], case
        assert words(case["text"]).input_ids == case["ids_with_special_tokens"]
        assert words.tokenize(case["text"]) == case["tokens"]
        assert words.decode(torch.tensor(case["ids"])) == case["decoded"] == words.batch_decode([case["ids"]])[0]


def test_several_texts_are_padded_as_released(tokenizer: SeedLlamaTokenizer) -> None:
    texts = ["a red apple", "a"]
    plain = tokenizer(texts)
    long, short = plain.input_ids
    assert plain["attention_mask"] == [[1] * len(long), [1] * len(short)] and len(long) > len(short)
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    assert batch.input_ids.tolist() == [long, short + [0] * (len(long) - len(short))]
    assert batch.attention_mask.sum(1).tolist() == [len(long), len(short)]
    assert tokenizer("a", return_tensors="pt").input_ids.tolist() == [short]
    assert tokenizer(texts, truncation=True, max_length=2).input_ids == [long[:2], short[:2]]
    assert len(tokenizer("a", padding="max_length", max_length=9).input_ids) == 9
    for wrong in ({"return_tensors": "pt"}, {"truncation": True}, {"padding": "left"}):
        with pytest.raises(ConfigError):
            tokenizer(texts, **wrong)


def test_pictures_in_every_form_give_codes(tokenizer: SeedLlamaTokenizer, picture: Image.Image, tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    picture.save(file)
    model = tokenizer.image_tokenizer.model
    pixels = seed_image_processor(32)(picture)
    codes = tokenizer.encode_image(image_torch=pixels)
    assert codes.shape == (1, 32) and codes.dtype == torch.int64 and torch.equal(codes, model.encode(pixels))
    for given in ({"image_path": file}, {"image_path": str(file)}, {"image_pil": picture}):
        assert torch.equal(tokenizer.encode_image(**given), codes)
    assert torch.equal(tokenizer.encode_image(str(file), image_size=99), codes)  # by place, as in the original
    assert torch.equal(tokenizer.encode_image(image_torch=torch.stack([pixels, pixels])), codes.expand(2, -1))
    grey = Image.new("LA", (9, 9), (80, 128))  # of any mode
    assert tokenizer.encode_image(image_pil=grey).shape == (1, 32)
    for given in ({}, {"image_pil": picture, "image_torch": pixels}):
        with pytest.raises(ConfigError, match="exactly one of image_path, image_pil and image_torch"):
            tokenizer.encode_image(**given)
    with pytest.raises(ImageError, match=r"\[B, 3, 32, 32\]"):
        tokenizer.encode_image(image_torch=torch.zeros(3, 20, 20))


def test_negatives_are_codes_in_any_batch(tokenizer: SeedLlamaTokenizer) -> None:
    generator = torch.Generator().manual_seed(0)
    codes, negative, other = (torch.randint(0, 16, (5, 32), generator=generator) for _ in range(3))
    plain = tokenizer.decode_image(codes[:1])
    assert isinstance(plain, list) and plain[0].size == (16, 16)
    avoided = tokenizer.decode_image(codes, negative, guidance_scale=5.0, num_inference_steps=3)
    assert len(avoided) == 5
    for row in range(5):  # alone as in the batch
        assert same(tokenizer.decode_image(codes[row], negative_indices=negative[row], guidance_scale=5.0,
                                           num_inference_steps=3), avoided[row:row + 1])
    one = tokenizer.decode_image(codes, negative_indices=negative[:1], guidance_scale=5.0, num_inference_steps=3)
    assert same(one[:1], avoided[:1]) and not same(one[1:], avoided[1:])
    assert not same(tokenizer.decode_image(codes[:1], other[:1]), plain)
    decoder, model = tokenizer.pictures.decoder, tokenizer.pictures.model
    by_hand = decoder(model.decode(codes[:1]), negative_embeds=model.decode(negative[:1]),
                      seeds=[0], guidance_scale=5.0, num_inference_steps=3)
    assert same(by_hand, avoided[:1])
    nine = codes.repeat(2, 1)[:9]  # more than one pass of 8
    assert same(tokenizer.decode_image(nine, negative[:1], 5.0, 3)[5:9], one[:4])
    with pytest.raises(CodesError, match="5 pictures were given with 2 rows of negative codes"):
        tokenizer.decode_image(codes, negative[:2])
    with pytest.raises(CodesError, match="outside the codebook"):
        tokenizer.decode_image(codes, [[99] * 32])


def test_a_system_steers_away_from_codes(tiny, tokenizer: SeedLlamaTokenizer) -> None:
    codes, negative = torch.arange(64).view(2, 32) % 16, torch.full((1, 32), 3)
    steered = tiny.reconstruct(codes, negative_codes=negative)
    assert same(steered, tokenizer.decode_image(codes, negative)) and not same(steered, tiny.reconstruct(codes))
    drawn = [tiny.draw("a red apple", negative_codes=rows) for rows in (None, negative)]
    assert not same(drawn[:1], drawn[1:])


def test_seed1_steers_away_from_codes(tmp_path: Path) -> None:
    tokenizer = tiny_seed1.tokenizer()
    folder = tiny_seed1.diffusion_folder(tmp_path / "sd")
    model = Seed1(tokenizer, load_decoder=lambda: StableDiffusionDetokenizer.from_pretrained(folder))
    codes, negative = torch.zeros(3, 32, dtype=torch.long), torch.arange(32)[None] % 8
    plain, steered = (model.draw(codes, num_inference_steps=2, guidance_scale=9.0, negative_codes=rows)
                      for rows in (None, negative))
    assert len(steered) == 3 and not same(plain, steered)
    parts = model.draw(codes, num_inference_steps=2, guidance_scale=9.0, batch_size=2, negative_codes=negative)
    assert all(np.abs(np.asarray(a, dtype=int) - np.asarray(b)).max() <= 1 for a, b in zip(parts, steered, strict=True))


def test_moving_takes_the_drawing_half_along(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machines of the tests have one device: that each part is told where to go."""
    tokenizer = SeedLlamaTokenizer.from_pretrained(tiny_folder / "seed_tokenizer", device="cpu", load_diffusion=True)
    told: list[object] = []
    monkeypatch.setattr(tokenizer.pictures.decoder, "to", lambda device: told.append(device))
    assert tokenizer.to("cpu") is tokenizer and told == [torch.device("cpu")] and tokenizer.device.type == "cpu"
    with pytest.raises(ConfigError, match="no usable CUDA device"):
        tokenizer.to("cuda:7")


@pytest.mark.parametrize(("lines", "dtype", "fp16"), [
    ("", torch.float32, True), ("fp16: True", torch.float32, True), ("fp16: False", torch.float32, False),
    ("fp16: True\ndtype: float16", torch.float16, True), ("fp16: False\ndtype: bf16", torch.bfloat16, False)])
def test_fp16_of_a_yaml(tiny_folder: Path, tmp_path: Path, lines: str, dtype: torch.dtype, fp16: bool) -> None:
    file = tmp_path / "words.yaml"
    file.write_text("_target_: models.seed_llama_tokenizer.SeedLlamaTokenizer.from_pretrained\n"
                    f"pretrained_model_name_or_path: {tiny_folder}/seed_tokenizer\nload_diffusion: True\n{lines}\n")
    tokenizer = instantiate(file, device="cpu")
    assert isinstance(tokenizer, SeedLlamaTokenizer) and tokenizer.fp16 is fp16
    assert tokenizer.pictures.model.dtype == dtype and tokenizer.pictures.decoder.unet.dtype == dtype
    assert tokenizer.encode_image(image_pil=Image.new("RGB", (9, 9))).shape == (1, 32)


def test_what_a_gpu_computes_in(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: what is asked for by `fp16` and `auto`, and what that means on one."""
    from seed_multimodal.systems import llama_tokenizer

    seen = []
    choose = llama_tokenizer.choose_device

    def watch(device: str, dtype: object, **more: str) -> object:
        seen.append((dtype, more["fp16"]))
        return choose(device, dtype, **more)

    monkeypatch.setattr(llama_tokenizer, "choose_device", watch)
    for fp16 in (True, False):
        SeedLlamaTokenizer.from_pretrained(tiny_folder / "seed_tokenizer", device="cpu", fp16=fp16)
    assert seen == [("auto", RELEASED_FP16), ("float32", RELEASED_FP16)]
    cuda = torch.device("cuda")
    assert _resolve_dtype("auto", cuda, RELEASED_FP16)[0] == torch.float16
    assert _resolve_dtype("float32", cuda, RELEASED_FP16)[0] == torch.float32
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert _resolve_dtype("auto", cuda, "")[0] == torch.bfloat16
