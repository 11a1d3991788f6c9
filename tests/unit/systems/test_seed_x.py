"""SEED-X with random weights: every task runs, every part is used as it should be, bad input is one sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_seed_x
import torch
from PIL import Image

from seed_multimodal.errors import CheckpointError, ConfigError, GenerationError, ImageError, RequestError
from seed_multimodal.language.answer import ImagePart
from seed_multimodal.language.generation import GenerationSettings
from seed_multimodal.language.seed_x import Box
from seed_multimodal.system.config import SystemConfig
from seed_multimodal.systems.seed_x import Detection, SeedX

WIDE = (48, 30)


def picture(seed: int = 0, size: tuple[int, int] = WIDE) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


@pytest.fixture(scope="module")
def base_x(tiny_x_folder: Path) -> SeedX:
    """The same weights as a model that follows no instructions."""
    return SeedX.from_pretrained(tiny_x_folder, tuned=False, device="cpu", log=None)


@pytest.fixture
def damaged(tiny_x_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_x_folder, tmp_path / "copy")


# ---- reading


def test_answers_are_the_agent_s_own(tiny_x: SeedX) -> None:
    """The same prompt through `ContinuousLVLM.generate`."""
    from seed_multimodal.seed_x.modeling import Prompt

    first, second = picture(0), picture(1, (32, 32))
    seen = tiny_x.pictures.read([first, second])
    assert [tuple(one.features.shape) for one in seen] == [(3, 16, 24), (5, 16, 24)]  # 2x1 and 2x2, and the whole
    ids = tiny_x.prompts.ask("What is this?", [3, 5])
    prompt = Prompt(ids, torch.cat([one.features for one in seen]), torch.cat([one.positions for one in seen]))
    settings = GenerationSettings(max_new_tokens=12, do_sample=False)
    expected = tiny_x.agent.generate([prompt], settings, tiny_x.tokenizer)[0]
    answer = tiny_x.chat([user(first, second, "What is this?")])
    assert list(answer.ids) == expected.ids
    assert tiny_x.ask([first, second], "What is this?") == tiny_x._words(answer)


def test_pictures_matter_and_are_read_once(tiny_x: SeedX) -> None:
    calls = []
    handle = tiny_x.pictures.model.register_forward_hook(lambda *arguments: calls.append(len(arguments[1][0])))
    try:
        one = tiny_x.describe(picture(7))
        assert tiny_x.describe(picture(7)) == one and calls == [3]
        assert tiny_x.describe(picture(8)) != one
    finally:
        handle.remove()


def test_placeholders_stand_for_pictures(tiny_x: SeedX) -> None:
    assert tiny_x.ask(picture(), "<image>What is this?") == tiny_x.ask(picture(), "What is this?")
    first, second = picture(1), picture(2)
    placed = tiny_x._task([first, second, "This <image>and that <image>?"], "ask")
    direct = tiny_x.to_request([("user", ["This ", first, "and that ", second, "?"])])
    assert placed.ids == direct.ids
    with pytest.raises(RequestError, match="holds 2 <image> placeholders for 1 pictures"):
        tiny_x.ask(picture(), "<image> or <image>?")


def test_prompts_of_the_base_model(base_x: SeedX) -> None:
    seen = base_x.tokenizer.vocabulary.read_ids(3)
    encode = base_x.tokenizer.encode_parts
    request = base_x._task([picture(), "What is this?"], "ask")
    assert request.ids == encode(["Question:", seen, "What is this?\nAnswer:"], add_bos=True)
    found = base_x._task([picture(), "there is a car"], "detect")
    assert found.ids == [*encode([seen, "there is a car [["], add_bos=True), base_x.tokenizer.vocabulary.boxes]
    with pytest.raises(ConfigError, match="not tuned to follow instructions"):
        base_x.chat([user("Hello")])
    with pytest.raises(ConfigError, match="SEED-X-Edit to edit"):
        base_x.edit(picture(), "Make it red.")
    assert base_x.draw("a fish").size == (16, 16)
    assert isinstance(base_x.describe(picture()), str)


def test_answers_for_people_hold_no_words_of_boxes(tiny_x: SeedX, monkeypatch: pytest.MonkeyPatch) -> None:
    words = tiny_x.tokenizer.vocabulary
    monkeypatch.setattr(tiny_x.speaker, "answer", lambda *_, **__: [
        *tiny_x.tokenizer.encode("a cat"), *Box(8, 4, 4, 2).ids(words), 2])
    assert tiny_x.ask(picture(), "What?") == "a cat"
    found = tiny_x.detect(picture(), "the cat")
    # 48 x 30 pixels on a grid of 16: centre (24, 7.5), size (12, 3.75)
    assert found.boxes == list(found) == [(18, 5, 30, 9)] and found.grid == [Box(8, 4, 4, 2)] and not found.problems
    shown = found.drawn()
    assert shown.getpixel((18, 5)) == shown.getpixel((29, 9)) == (0, 255, 0) != picture().getpixel((18, 5))
    assert shown.getpixel((24, 7)) == picture().getpixel((24, 7)) and found.picture.getpixel((18, 5)) != (0, 255, 0)


@pytest.mark.parametrize(("answer", "sentence"), [
    ("<box_start><loc-1><loc-2><loc-3><box_end>", "A box has 3 numbers instead of 4"),
    ("<box_start><loc-1><loc-2><loc-3>", "A box is not closed"),
    ("<box_start><loc-1><loc-2><loc-0><loc-3><box_end>", "no width or no height"),
    ("<box_start><loc-1>the cat<box_end>", "other words than locations"),
    ("<box_end>", "stands without"),
])
def test_malformed_boxes(tiny_x: SeedX, monkeypatch: pytest.MonkeyPatch, answer: str, sentence: str) -> None:
    said: list[str] = []
    monkeypatch.setattr(tiny_x, "log", said.append)
    monkeypatch.setattr(tiny_x.speaker, "answer", lambda *_, **__: tiny_x.tokenizer.encode(answer))
    found = tiny_x.detect(picture(), "the cat")
    assert not found.boxes and len(found) == 0
    assert len(found.problems) == 1 and sentence in found.problems[0] and said == found.problems


def test_detection_without_answers(tiny_x: SeedX) -> None:
    assert isinstance(tiny_x.detect(picture(), "the cat", max_new_tokens=2), Detection)
    with pytest.raises(RequestError, match="one picture"):
        tiny_x.detect([picture(), picture()], "the cat")
    with pytest.raises(RequestError, match="The phrase is empty"):
        tiny_x.detect(picture(), " ")


# ---- drawing


def test_drawings_follow_what_the_model_wrote(tiny_x: SeedX) -> None:
    """A drawing is that of the features that `ContinuousLVLM.generate` gives for the same request."""
    from seed_multimodal.seed_x.modeling import Prompt

    ids = tiny_x.prompts.draw("a fish")
    settings = GenerationSettings(max_new_tokens=5, do_sample=False, force_image=True)
    written = tiny_x.agent.generate([Prompt(ids)], settings, tiny_x.tokenizer)[0]
    drawn = tiny_x.pictures.draw(written.features, seed=3)[0]
    answer = tiny_x.chat([user("Generate an image: a fish")], force_image=True, max_new_tokens=5, seed=3)
    assert np.array_equal(answer.images[0], drawn)
    assert not np.array_equal(tiny_x.pictures.draw(written.features, seed=4)[0], drawn)
    assert not np.array_equal(tiny_x.draw("two red apples", seed=3), tiny_x.draw("a blue fish", seed=3))


@pytest.mark.parametrize("size", [(48, 30), (16, 40), (20, 20)])
def test_edits_keep_the_aspect_ratio(tiny_x: SeedX, size: tuple[int, int]) -> None:
    source = picture(5, size)
    wanted = size[0] / size[1]
    for ratio in ("restore", "keep"):
        edited = tiny_x.edit(source, "Make it red.", ratio=ratio)
        assert abs(edited.width / edited.height / wanted - 1) < 0.1, (ratio, edited.size)
    assert tiny_x.edit(source, "Make it red.", ratio="square").size == (16, 16)
    assert tiny_x.edit(source, "Make it red.", height=24, width=16).size == (16, 24)
    with pytest.raises(ConfigError, match="ratio"):
        tiny_x.edit(source, "Make it red.", ratio="wide")


def test_edits_see_their_source_in_one_view(tiny_x: SeedX, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    real = tiny_x.pictures.draw
    monkeypatch.setattr(tiny_x.pictures, "draw", lambda features, **own: seen.append(own) or real(features, **own))
    tiny_x.edit(picture(), "Make it red.", seed=2)
    assert seen[0]["conditions"][0].size == WIDE and seen[0]["seed"] == 2
    request = tiny_x._task([picture(), "Make it red."], "edit")
    assert len(tiny_x.prompts.vocabulary.places(request.ids)) == 2 * tiny_seed_x.WORDS


def test_reconstruction_from_all_and_from_pooled_features(tiny_x: SeedX) -> None:
    one, other = picture(0), picture(1, (20, 20))
    both = tiny_x.reconstruct([one, other], seed=1)
    assert [made.size for made in both] == [(16, 16), (16, 16)]
    assert np.array_equal(tiny_x.reconstruct(one, seed=1)[0], both[0])  # whatever the batch
    assert not np.array_equal(tiny_x.reconstruct(one, seed=1, embeddings=4)[0], both[0])
    beside = tiny_x.reconstruct(one, condition=other, seed=1, ratio="square")[0]
    assert not np.array_equal(beside, both[0])
    with pytest.raises(ConfigError, match="must divide the tower's 16"):
        tiny_x.reconstruct(one, embeddings=5)


def test_a_first_stage_takes_no_condition(tmp_path: Path) -> None:
    folder = tiny_seed_x.build(tmp_path, stage=1)
    system = SeedX.from_pretrained(folder, device="cpu", log=None)
    assert system.edit(picture(), "Make it red.").size == (16, 16)
    with pytest.raises(ConfigError, match="first stage"):
        system.reconstruct(picture(), condition=picture())


def test_a_model_that_speaks_first_is_forced_only_where_it_draws_nothing(
    tiny_x: SeedX, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = tiny_x.tokenizer.vocabulary
    asked: list[bool] = []

    def answer(prompt: Any, settings: GenerationSettings, opening: str = "", **_: Any) -> list[int]:
        asked.append(settings.force_image)
        return [*tiny_x.tokenizer.encode("I cannot."), *(words.run()[:2] if settings.force_image else ())]

    monkeypatch.setattr(tiny_x.speaker, "answer", answer)
    with pytest.raises(GenerationError, match="no whole picture: A picture broke off"):
        tiny_x.draw("a fish")
    assert asked == [False, True]


# ---- conversations


def test_streams_equal_answers(tiny_x: SeedX) -> None:
    messages = [user(picture(0), picture(1), "What?")]
    plain = tiny_x.chat(messages, force_image=True, seed=1)
    events = list(tiny_x.chat(messages, stream=True, force_image=True, seed=1))
    assert events[-1]["answer"].parts == plain.parts and list(events[-1]["answer"].ids) == list(plain.ids)
    drawn = next(event for event in events if event["type"] == "image")
    assert set(drawn) == {"type", "codes", "image"} and np.array_equal(drawn["image"], plain.images[0])
    assert "".join(event["text"] for event in events if event["type"] == "text").strip() == plain.text.strip()
    with pytest.raises(ConfigError, match="only when it is whole"):
        tiny_x.chat(messages, stream=True, previews=(2,))


def test_turns_after_a_drawn_picture(tiny_x: SeedX) -> None:
    """The next prompt goes on from this one's ids; the picture drawn last is what is edited."""
    first = [user(picture(), "Make it red.")]
    answer = tiny_x.chat(first, force_image=True, max_new_tokens=5)
    assert [type(part) for part in answer.parts][0].__name__ == "DrawnPart"
    both = [*first, {"role": "assistant", "content": answer}, user("And now?")]
    before = tiny_x.to_request([("user", [picture(), "Make it red."])]).ids
    contents = [("user", [picture(), "Make it red."]), ("assistant", list(answer.parts)), ("user", ["And now?"])]
    ids = tiny_x.to_request(contents).ids
    assert ids[:len(before) + len(answer.ids)] == [*before, *answer.ids]
    shown = answer.images[0]
    drawn = tiny_x.chat(both, force_image=True, max_new_tokens=5).images[0]
    assert abs(drawn.width / drawn.height - shown.width / shown.height) < 0.2
    with pytest.raises(RequestError, match="have no codes"):
        tiny_x.chat([user([0, 1, 2]), ])
    assert isinstance(answer.parts[0], ImagePart)


def test_beams_draw_too(tiny_x: SeedX) -> None:
    messages = [user(picture(), "Make it red.")]
    answer = tiny_x.chat(messages, force_image=True, num_beams=2)
    assert len(answer.images) == 1
    assert tiny_x.chat(messages, force_image=True, num_beams=2).parts == answer.parts


# ---- loading


def test_released_folders_by_their_short_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tiny_seed_x.build_released(tmp_path / "pretrained")
    monkeypatch.chdir(tmp_path)
    for name, tuned, stage in (("seed-x", False, 4), ("seed-x-i", True, 4), ("SEED-X-Edit", True, 8)):
        system = SeedX.from_pretrained(name, device="cpu", log=None)
        assert system.spec.tuned is tuned
        assert system.pictures.decoder.adapter.unet.config.in_channels == stage
        assert isinstance(system.describe(picture(), max_new_tokens=3), str)
    assert SystemConfig.find(home).tuned  # a copy of the hub's repository: the instruction-tuned model of it
    shutil.rmtree(home / "QwenViT")
    with pytest.raises(CheckpointError, match="reload_qwen_vit.py .* into pretrained/QwenViT.*--model nano"):
        SeedX.from_pretrained("seed-x", device="cpu", log=None)


def test_the_hub_s_repository_by_its_name_and_in_its_client_s_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    home = tiny_seed_x.build_released(tmp_path / "pretrained")
    found = SystemConfig.find("AILab-CVC/SEED-X-17B")
    assert found.llm == Path("pretrained/seed_x_i/llm") and found.tuned
    kept = tmp_path / "cache" / "models--AILab-CVC--SEED-X-17B"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text("0" * 40)
    for part in ("seed_x_edit", "cvlm_llama2_tokenizer_100img_and_224loc_addpatch", "seed_detokenizer"):
        shutil.copytree(home / part, kept / "snapshots" / ("0" * 40) / part)
        shutil.rmtree(home / part)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    spec = SystemConfig.find("seed-x-edit").require("llm")
    assert spec.llm == kept / "snapshots" / ("0" * 40) / "seed_x_edit" / "llm" and spec.grids == ("1x1",)
    assert SeedX.from_pretrained("seed-x-edit", device="cpu", log=None).pictures.reads_condition
    with pytest.raises(CheckpointError, match="seed_x/llm"):
        (home / "seed_x").rename(home / "elsewhere")
        SystemConfig.find("seed-x").require("llm")


def test_what_is_not_there(tiny_x_folder: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder; give nano, .* seed-x-i, seed-x-edit"):
        SeedX.from_pretrained("nowhere/at_all", log=None)
    closed = SeedX.from_pretrained(tiny_x_folder, device="cpu", load_decoder=False, log=None)
    with pytest.raises(CheckpointError, match="load_decoder=False"):
        closed.draw("a fish")
    assert closed.chat([user("Hello")], force_image=True).images == []
    with pytest.raises(ImageError, match="missing.png"):
        closed.describe("missing.png")


def test_parts_of_another_size(damaged: Path) -> None:
    values = json.loads((damaged / "agent" / "config.json").read_text())
    values["output_resampler"]["embed_dim"] = 48
    (damaged / "agent" / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="agent.*: .* tensors have another size"):
        SeedX.from_pretrained(damaged, device="cpu", log=None)
    values["input_resampler"]["embed_dim"] = 48
    (damaged / "agent" / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="input resampler writes width 48, but .* has width 32"):
        SeedX.from_pretrained(damaged, device="cpu", log=None)


def test_the_folder_says_which_system_it_is(damaged: Path, tiny_x_folder: Path) -> None:
    from seed_multimodal.systems.seed_llama import SeedLlama

    with pytest.raises(ConfigError, match="is another system, seed_x"):
        SeedLlama.from_pretrained(tiny_x_folder, log=None)
    values = json.loads((damaged / "system.json").read_text())
    (damaged / "system.json").write_text(json.dumps({**values, "system": "seed_y"}))
    with pytest.raises(ConfigError, match="system.json: system"):
        SeedX.from_pretrained(damaged, log=None)
    (damaged / "system.json").write_text(json.dumps({**values, "grid": ["1x1"]}))
    with pytest.raises(ConfigError, match="unknown key 'grid'"):
        SeedX.from_pretrained(damaged, log=None)
