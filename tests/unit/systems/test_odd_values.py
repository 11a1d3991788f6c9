"""Whatever is given to the Python interface, it answers, or refuses in one sentence: parameters x values.

The same for the commands: tests/test_odd_flags.py, and for the server: tests/serving/test_odd_requests.py.
"""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from seed_multimodal.errors import (
    CheckpointError,
    CodesError,
    ConfigError,
    GenerationError,
    ImageError,
    RequestError,
    SeedError,
)
from seed_multimodal.language.generation import generate_ids
from seed_multimodal.systems.llama_tokenizer import SeedLlamaTokenizer
from seed_multimodal.systems.seed_llama import SeedLlama

NUMBERS: list[Any] = [
    None, True, False, -1, 0, 1, 2, 2.0, 1.5, 0.5, -0.0, 1e-38, 1e-45, 5e-324, 1e38, 1e308, math.inf, -math.inf,
    math.nan, 2000, 2**64, 10**30, "1", "", "\uff11", b"1", [], [1], {}, (1,), 1j, np.int64(2), np.float32(0.5),
    np.float64(0.5), torch.tensor(1), object(), "\ud800"]
TEXTS: list[Any] = [None, 1, math.nan, True, b"x", "", " ", "\n", "...", "\ud800", "a\udcffb", "\x00", "\U0001f600",
                    "<image>", "</s>", [], ["x"], {}, object(), "x" * 100_000]
PICTURE = Image.fromarray((np.random.default_rng(1).random((40, 50, 3)) * 255).astype(np.uint8))
ARRAY = np.asarray(PICTURE)
MESSAGE = [{"role": "user", "content": [PICTURE, "hello"]}]


def png() -> bytes:
    buffer = io.BytesIO()
    PICTURE.save(buffer, "PNG")
    return buffer.getvalue()


def closed() -> io.BytesIO:
    file = io.BytesIO(png())
    file.close()
    return file


ODD_PICTURES: list[Any] = [
    None, 1, 1.5, [], [None], [1, 2], (), {}, {"a": 1}, object(), {1}, "", ".", "a\0b", "\udcff.png", "x" * 5000,
    Path("."), b"", b"no picture", bytearray(png()), memoryview(png()), io.StringIO("x"), io.BytesIO(), closed(),
    [1.0] * 32, [True] * 32, [-1] * 32, [10**30] * 32, torch.rand(3, 32, 32), torch.ones(2, 32, dtype=torch.long),
    ARRAY / 255.0, ARRAY.astype(np.int64), ARRAY.transpose(2, 0, 1), ARRAY > 9, ARRAY[None], ARRAY[0, 0],
    np.array([None]), np.zeros((0, 0, 3), np.uint8), np.full((4, 4, 3), math.nan), Image.new("RGB", (0, 5)),
    Image.new("F", (5, 5), math.nan)]


def answers_or_refuses(call: Callable[[], Any], what: str) -> str | None:
    """The sentence of a refusal; fails for anything but a result or one sentence."""
    try:
        call()
    except SeedError as error:
        sentence = str(error)
        assert sentence.strip() and "\n" not in sentence and sentence.endswith("."), f"{what}: {sentence!r}"
        return sentence
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    return None


@pytest.mark.slow
@pytest.mark.parametrize("key", ["max_new_tokens", "temperature", "top_p", "top_k", "num_beams", "do_sample", "seed",
                                 "constrain", "repetition_penalty"])
def test_generation_settings(tiny: SeedLlama, key: str) -> None:
    values = [one for one in NUMBERS if key not in ("num_beams", "max_new_tokens") or not isinstance(one, int)
              or one < 100 or one > 2000]
    refused = 0
    for value in values:
        options = {"max_new_tokens": 3, "do_sample": True, key: value}
        for beams in ({}, {"num_beams": 2}) if key in ("temperature", "top_p", "top_k") else ({},):
            said = answers_or_refuses(lambda o=options | beams: tiny.chat(MESSAGE, **o), f"chat({key}={value!r})")
            refused += said is not None
        streamed = answers_or_refuses(lambda o=options: list(tiny.chat(MESSAGE, stream=True, **o)), f"stream {value!r}")
        assert (said is None) == (streamed is None)
    assert refused >= 10


@pytest.mark.slow
@pytest.mark.parametrize("key", ["num_inference_steps", "guidance_scale", "noise_level", "scheduler", "seed",
                                 "batch_size", "height"])
def test_drawing_settings(tiny: SeedLlama, key: str) -> None:
    codes = tiny.tokenize(PICTURE)
    calls: list[Callable[..., Any]] = [lambda **o: tiny.reconstruct(codes, **o)]
    if key == "num_inference_steps":
        calls.append(lambda **o: tiny.draw("a fish", **o))
    for call in calls:
        told = [answers_or_refuses(lambda v=value, f=call: f(**{"num_inference_steps": 1} | {key: v}),
                                   f"{key}={value!r}") for value in NUMBERS]
        assert sum(one is not None for one in told) >= 10
        assert all(one is None for value, one in zip(NUMBERS, told, strict=True) if isinstance(value, np.int64)) or \
            key in ("scheduler", "height")


def test_wrong_drawings_are_refused_before_the_model_writes(tiny: SeedLlama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny.speaker, "answer", lambda *_, **__: pytest.fail("The model wrote."))
    for wrong in ({"noise_level": -1}, {"num_inference_steps": 0}, {"scheduler": "None"}, {"guidance_scale": math.inf}):
        for draw in (lambda o=wrong: tiny.draw("a fish", **o), lambda o=wrong: tiny.edit(PICTURE, "green", **o),
                     lambda o=wrong: tiny.chat(MESSAGE, **o)):
            with pytest.raises(ConfigError, match=next(iter(wrong))):
                draw()
    with pytest.raises(CodesError):
        tiny.draw("a fish", negative_codes=[1])


@pytest.mark.slow
def test_texts(tiny: SeedLlama) -> None:
    codes = tiny.tokenize(PICTURE)[0].tolist()
    calls: dict[str, Callable[[Any], Any]] = {
        "describe": lambda v: tiny.describe(codes, prompt=v, max_new_tokens=2),
        "ask": lambda v: tiny.ask(codes, v, max_new_tokens=2), "draw": tiny.draw, "edit": lambda v: tiny.edit(codes, v),
        "long question": lambda v: tiny.ask(codes, v, short=False, max_new_tokens=2),
        "verbatim": lambda v: tiny.draw(v, verbatim=True),
        "content": lambda v: tiny.chat([{"role": "user", "content": v}], max_new_tokens=2),
        "item": lambda v: tiny.chat([{"role": "user", "content": [codes, v]}], max_new_tokens=2),
        "assistant": lambda v: tiny.chat([MESSAGE[0], {"role": "assistant", "content": v}, MESSAGE[0]],
                                         max_new_tokens=2),
        "role": lambda v: tiny.chat([{"role": v, "content": "x"}]), "message": lambda v: tiny.chat([v]),
        "messages": tiny.chat}
    for name, call in calls.items():
        told = {repr(value): answers_or_refuses(lambda v=value, f=call: f(v), f"{name}({value!r:.40})")
                for value in TEXTS}
        assert told[repr("\ud800")] is not None and told["1"] is not None, name
        if name in ("ask", "draw", "edit", "describe", "verbatim"):
            assert "empty" in (told["''"] or "") and "empty" in (told["' '"] or "") and told["'<image>'"] is None
    with pytest.raises(RequestError, match="must be plain Unicode text"):
        tiny.draw("ab\ud800")


def test_texts_and_ids_of_the_tokenizer_object(tiny: SeedLlama) -> None:
    words = SeedLlamaTokenizer(tiny.tokenizer, tiny.pictures)
    assert words.to("cpu") is words and words.decode(words.encode("hello"), True) == "hello"
    for prompts in (None, 1, [1], [[1.5]], [["a"]], "ab", [[10**30]], [[]]):
        with pytest.raises(GenerationError, match="^Prompt"):
            generate_ids(tiny.llm, prompts, tiny.settings(), tiny.tokenizer)  # type: ignore[arg-type]


def test_names_that_no_file_has(tiny_folder: Path) -> None:
    for name in ("x" * 5000, "a\0b", "owner/" + "x" * 5000):
        for part in ("llm", "tokenizer", "vision"):
            with pytest.raises(CheckpointError):
                SeedLlama.from_pretrained(tiny_folder, log=None, **{part: name})
        for call in (SeedLlama.from_pretrained, SeedLlamaTokenizer.from_pretrained):
            with pytest.raises(CheckpointError):
                call(name)


def test_pictures(tiny: SeedLlama) -> None:
    calls: list[Callable[[Any], Any]] = [
        tiny.tokenize, lambda v: tiny.reconstruct(v, num_inference_steps=1), lambda v: tiny.edit(v, "green"),
        lambda v: tiny.describe(v, max_new_tokens=2), lambda v: tiny.ask(v, "what?", max_new_tokens=2),
        lambda v: tiny.chat([{"role": "user", "content": [v, "x"]}], max_new_tokens=2),
        lambda v: tiny.chat([{"role": "user", "content": v}], max_new_tokens=2),
        lambda v: tiny.chat([{"role": "user", "content": [{"type": "image", "image": v}]}], max_new_tokens=2)]
    for value in ODD_PICTURES:
        for number, call in enumerate(calls):
            answers_or_refuses(lambda v=value, f=call: f(v), f"{number}: {value!r:.60}")
    for value in (None, 1, object()):
        with pytest.raises(ImageError, match=f"{type(value).__name__} is no picture; give a file"):
            tiny.tokenize(value)


def test_arrays_and_open_files_are_pictures(tiny: SeedLlama, tmp_path: Path) -> None:
    want = tiny.tokenize(PICTURE)
    PICTURE.save(tmp_path / "a.png")
    buffer = io.BytesIO(png())
    buffer.seek(17)  # as a buffer is that was just written
    with open(tmp_path / "a.png", "rb") as file:
        for picture in (ARRAY, buffer, buffer, file, bytearray(png()), memoryview(png()),
                        np.dstack([ARRAY, np.full((40, 50), 255, np.uint8)])):
            assert torch.equal(tiny.tokenize(picture), want)
            said = tiny.chat([{"role": "user", "content": [picture, "hello"]}], max_new_tokens=3)
            assert said.ids == tiny.chat(MESSAGE, max_new_tokens=3).ids
            assert tiny.ask(picture, "What?") == tiny.ask(PICTURE, "What?")
    assert torch.equal(tiny.tokenize(ARRAY[..., 0]), tiny.tokenize(PICTURE.getchannel(0)))
    assert torch.equal(tiny.tokenize([ARRAY, PICTURE]), want[[0, 0]])


def test_temperatures_without_warmth_are_greedy(tiny: SeedLlama) -> None:
    greedy = tiny.chat(MESSAGE, max_new_tokens=8, do_sample=False).ids
    for cold in (0, 1e-45, 1e-38, 1e-10, 1e-5):
        assert tiny.chat(MESSAGE, max_new_tokens=8, temperature=cold, top_p=1.0).ids == greedy


# ---- damaged weights


def test_weights_that_are_not_numbers_are_named(tiny_folder: Path) -> None:
    system = SeedLlama.from_pretrained(tiny_folder, device="cpu", log=None)
    codes = system.tokenize(PICTURE)[0].tolist()
    sound = system.chat(MESSAGE, max_new_tokens=3).ids
    parts = {"The language model": (system.llm, lambda: system.describe(codes)),
             "The image tokenizer": (system.pictures.model, lambda: system.tokenize(PICTURE))}
    for who, (model, call) in parts.items():
        name, weight = [pair for pair in model.named_parameters() if "attn" in pair[0] and pair[1].ndim > 1][0]
        before = weight.detach().clone()
        for value in (math.nan, math.inf):
            with torch.no_grad():
                weight.view(-1)[:5] = value
            with pytest.raises(CheckpointError, match=f"{who} gives no numbers: its tensor {name} holds NaN"):
                call()
        with torch.no_grad():
            weight.copy_(before)
    for options in ({}, {"temperature": 2.0}, {"num_beams": 2}, {"num_beams": 2, "do_sample": True},
                    {"constrain": False}):
        weight = system.llm.model.norm.weight
        with torch.no_grad():
            weight += math.nan
        with pytest.raises(CheckpointError, match=r"norm\.weight holds NaN"):
            system.chat(MESSAGE, **options)
        with pytest.raises(CheckpointError, match=r"norm\.weight holds NaN"):
            list(system.chat(MESSAGE, stream=True, **options))
        with torch.no_grad():
            weight.fill_(1.0)
    assert system.chat(MESSAGE, max_new_tokens=3).ids == sound
    with pytest.raises(ImageError, match="pixels hold NaN"):
        system.encode_pixels(torch.full((1, 3, 32, 32), math.nan))
    with pytest.raises(GenerationError, match="computed NaN or infinity"):
        system.reconstruct(codes, guidance_scale=1e38)


# ---- system.json


@pytest.mark.slow
@pytest.mark.parametrize("key", ["tokenizer", "llm", "detokenizer", "vision", "template", "image_size", "transform",
                                 "generation", "tasks", "unknown"])
def test_system_json(tiny_folder: Path, tmp_path: Path, key: str) -> None:
    from seed_multimodal.system.config import SystemConfig

    whole = json.loads((tiny_folder / "system.json").read_text())
    for name in ("seed_tokenizer", "seed_llama"):
        (tmp_path / name).symlink_to(tiny_folder / name)
    odd: list[Any] = [None, True, 0, -1, 1.5, math.nan, math.inf, 10**30, "", "x", "a\0b", "../x", "\ud800", "x" * 5000,
                      [], [1], {}, {"a": 1}]
    inner = {"transform": ("type", "interpolation", "keep_ratio", "image_size"), "generation": ("temperature", "seed"),
             "tasks": ("draw", "describe")}
    odd += [{name: one} for name in inner.get(key, ()) for one in (None, True, -1, math.nan, "x", [], {}, "\ud800")]
    for value in odd:
        (tmp_path / "system.json").write_text(json.dumps({**whole, key: value}))

        def load() -> None:
            SystemConfig.find(tmp_path)
            if key in inner or key in ("template", "image_size"):
                SeedLlama.from_pretrained(tmp_path, device="cpu", log=None).describe(PICTURE, max_new_tokens=1)

        answers_or_refuses(load, f"{key}: {value!r:.60}")


@pytest.mark.parametrize(("file", "key"), [
    ("seed_llama/config.json", "attention_bias"), ("seed_llama/config.json", "hidden_size"),
    ("seed_tokenizer/diffusion_model/seed_decode.json", "guidance_scale"),
    ("seed_tokenizer/diffusion_model/seed_decode.json", "scheduler"),
    ("seed_tokenizer/diffusion_model/layout/config.json", "channels"),
    ("seed_tokenizer/diffusion_model/model_index.json", "feature_extractor")])
@pytest.mark.slow
def test_settings_beside_the_weights(tiny_folder: Path, tmp_path: Path, file: str, key: str) -> None:
    home = shutil.copytree(tiny_folder, tmp_path / "system")
    whole = json.loads((home / file).read_text())
    texts = [json.dumps({**whole, key: value}) for value in ("x", -1, math.nan, [], {"a": 1})]
    for text in (*texts, "[" * 100_000, "null", ""):
        (home / file).write_text(text)
        answers_or_refuses(lambda: SeedLlama.from_pretrained(home, device="cpu", log=None).reconstruct(PICTURE),
                           f"{file}: {text[:40]}")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "", "[]", "null", "1" * 5000, "\ufeff{}", "{"],
                         ids=lambda text: text[:9])
def test_system_json_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "system.json").write_text(text)
    with pytest.raises(ConfigError, match=r"system\.json: (not valid json|must hold a json object)"):
        SeedLlama.from_pretrained(tmp_path, log=None)
    (tmp_path / "system.json").write_bytes(b'{"llm": "\xff"}')
    with pytest.raises(ConfigError, match=r"system\.json: not valid json"):
        SeedLlama.from_pretrained(tmp_path, log=None)
