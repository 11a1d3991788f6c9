"""`Lavit` on a tiny random model: every task, pictures of any size, batches, seeds, missing parts."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import tiny_lavit
import torch
from safetensors.torch import load_file, save_file
from tiny_lavit import picture, same

from seed_multimodal.device import Runtime
from seed_multimodal.errors import (
    CheckpointError,
    CodesError,
    ConfigError,
    GenerationError,
    ImageError,
    RequestError,
)
from seed_multimodal.language.lemmatizer import Lemmatizer
from seed_multimodal.system.config import SystemConfig
from seed_multimodal.systems.lavit import Lavit
from seed_multimodal.systems.open_system import open_pictures, open_system

pytestmark = pytest.mark.filterwarnings("ignore:Answers are not lemmatised")
CARD = Runtime(torch.device("cuda"), torch.bfloat16)


def open_tiny(folder: Path, **options) -> Lavit:
    return Lavit.from_pretrained(folder, device="cpu", log=None, **options)


@pytest.fixture
def damaged(tiny_lavit_folder, tmp_path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(tiny_lavit_folder, tmp_path / "copy"))


def test_what_is_asked_in_another_form_is_one_sentence(tiny_lavit, tiny_lavit_folder):
    for error, words, call in (
            (RequestError, "must be a list, not NoneType", lambda: tiny_lavit.describe_all(None)),
            (RequestError, "must be a list, not str", lambda: tiny_lavit.describe_all("cat.png")),
            (RequestError, "must be a list, not int", lambda: tiny_lavit.describe(picture(1), 3)),
            (RequestError, "must be a list, not int", lambda: tiny_lavit.draw("a fish", negative=3)),
            (CodesError, "ids are rows of whole numbers", lambda: tiny_lavit.draw("a fish", negative=["blue", "red"])),
            (RequestError, "texts to draw must be a list, not str", lambda: tiny_lavit.draw_all("a fish")),
            (RequestError, "is empty", lambda: tiny_lavit.compose(["", " "])),
            (ConfigError, "number must be at most 1000", lambda: tiny_lavit.draw_all(["a fish"], number=10**6)),
            (CodesError, "not NoneType", lambda: tiny_lavit.reconstruct(None)),
            (CodesError, "Picture 1 must be a row of codes", lambda: tiny_lavit.reconstruct([["a"]])),
            (ConfigError, "modes: unknown key 'talking'", lambda: open_tiny(tiny_lavit_folder, modes=("talking",))),
            (ConfigError, "one of understanding, generation", lambda: open_tiny(tiny_lavit_folder, modes=())),
            (ConfigError, "offload: unknown key 'tower'", lambda: open_tiny(tiny_lavit_folder, offload=["tower"])),
            (ConfigError, "did you mean 'decoder'", lambda: open_tiny(tiny_lavit_folder, decodr="elsewhere"))):
        with pytest.raises(error, match=words):
            call()


# ---- reading


def test_pictures_of_any_size_alone_and_in_a_batch(tiny_lavit):
    pictures = [picture(1), picture(2, (300, 20)), picture(3, (1, 1))]
    together = tiny_lavit.describe_all(pictures, seed=5)
    assert together == [tiny_lavit.describe(one, seed=5) for one in pictures]
    assert len(set(together)) == 3
    asked = tiny_lavit.ask_all(pictures, ["What is this?", "Is it a cat?", "Where?"], seed=5)
    assert asked[1] == tiny_lavit.ask(pictures[1], "Is it a cat?", seed=5)
    begun = ["a red apple beside", "", "a"]
    assert tiny_lavit.describe_all(pictures, begun, seed=5) == [
        tiny_lavit.describe(one, words, seed=5) for one, words in zip(pictures, begun, strict=True)]
    assert tiny_lavit.describe_all([]) == tiny_lavit.ask_all([], []) == []


def test_the_seed_chooses_the_patches_and_threshold_is_not_random(tiny_lavit):
    codes = [tiny_lavit.pictures.tokenize(picture(1), seed=seed)[0].tolist() for seed in (1, 1, 2)]
    assert codes[0] == codes[1] != codes[2]
    firm = [tiny_lavit.pictures.tokenize(picture(1), seed=seed, selection="threshold")[0].tolist() for seed in (1, 2)]
    assert firm[0] == firm[1]
    kept = tiny_lavit.pictures.kept([picture(1), picture(2)], seed=1)
    assert kept[0].shape == (4, 4) and int(kept[0].sum()) == len(codes[0])
    with pytest.raises(ConfigError, match="Unknown selection 'thresh'"):
        tiny_lavit.describe(picture(1), selection="thresh")


def test_a_seed_of_none_is_the_global_generator(tiny_lavit):
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(tiny_lavit.pictures.tokenize(picture(1), seed=None)[0].tolist())
    assert found[0] == found[1] != found[2]


def test_several_pictures_in_one_prompt(tiny_lavit):
    both = tiny_lavit.describe([picture(1), picture(2)])
    assert both != tiny_lavit.describe(picture(1)) and both != tiny_lavit.describe([picture(2), picture(1)])
    inputs = tiny_lavit.language.inputs([tiny_lavit.pictures.read([picture(1), picture(2)])], None, "caption")
    lengths = [len(rows) for rows in tiny_lavit.pictures.read([picture(1), picture(2)])]
    assert inputs[0].shape[1] == sum(lengths) + 4  # each between a start and an end


def test_a_prompt_and_options_change_the_answer(tiny_lavit):
    plain = tiny_lavit.describe(picture(1))
    assert plain != tiny_lavit.describe(picture(1), "a red")
    drawn = [tiny_lavit.describe(picture(1), temperature=2.0, max_new_tokens=12, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert tiny_lavit.language.settings("describe", temperature=2.0).num_beams == 1
    assert tiny_lavit.language.settings("ask").num_beams == 5
    with pytest.raises(ConfigError, match="Unknown option 'max_tokens'.*max_new_tokens"):
        tiny_lavit.describe(picture(1), max_tokens=3)
    with pytest.raises(RequestError, match="2 pictures, but 1 texts"):
        tiny_lavit.describe_all([picture(1), picture(2)], ["one"])
    with pytest.raises(RequestError, match="needs a picture"):
        tiny_lavit.describe([])


def test_pictures_that_cannot_be_read_are_named(tiny_lavit, tmp_path):
    (tmp_path / "torn.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match="torn.png"):
        tiny_lavit.describe(str(tmp_path / "torn.png"))
    with pytest.raises(ImageError, match="absent.png"):
        tiny_lavit.compose([tmp_path / "absent.png", "in the snow"])
    with pytest.raises(ImageError, match="NaN"):
        tiny_lavit.pictures.tokenize(torch.full((1, 3, 16, 16), torch.nan))
    with pytest.raises(ImageError, match=r"\[B, 3, 16, 16\]"):
        tiny_lavit.pictures.tokenize(torch.zeros(1, 3, 20, 20))


def test_a_decoder_that_gives_no_numbers_is_named(damaged):
    file = damaged / "decoder" / "model.safetensors"
    save_file({name: value * torch.nan for name, value in load_file(file).items()}, file)
    with pytest.raises(GenerationError, match="computed NaN or infinity"):
        open_tiny(damaged).draw("a red apple")


def test_sizes_that_are_missing_or_none_are_named(damaged):
    for file in ("decoder", "tokenizer"):
        (damaged / file / "config.json").rename(damaged / file / "sizes")
        with pytest.raises(ConfigError, match=rf"{file}/config\.json: there is no such file"):
            open_tiny(damaged).draw("a red apple")
        (damaged / file / "sizes").rename(damaged / file / "config.json")


# ---- drawing


def test_drawing_alone_and_in_a_batch_in_ratios_and_sizes(tiny_lavit):
    texts = ["a red apple", "two dogs"]
    drawn = tiny_lavit.draw_all(texts, seed=3)
    assert all(same(one, tiny_lavit.draw(text, seed=3)) for one, text in zip(drawn, texts, strict=True))
    assert not same(*drawn) and drawn[0].size == (64, 64)
    assert tiny_lavit.draw(texts[0], ratio="3:2").size == (80, 48) and tiny_lavit.draw(texts[0], ratio="2:3").size == (
        48, 80)
    assert tiny_lavit.draw(texts[0], height=32, width=40).size == (40, 32)
    several = tiny_lavit.draw_all(texts, number=2, seed=[3, 8])
    assert len(several) == 4 and same(several[0], drawn[0]) and not same(several[0], several[1])


def test_composing_pictures_and_words(tiny_lavit):
    dog, words = picture(1), "in the snow"
    drawn = tiny_lavit.compose([dog, words], seed=1)
    assert same(drawn, tiny_lavit.edit(dog, words, seed=1))
    codes = tiny_lavit.pictures.tokenize(dog, seed=1)[0].tolist()
    assert same(drawn, tiny_lavit.compose([codes, words], seed=1))
    prompts = [[dog, words], [words, dog], [dog, picture(2)]]
    written = [tiny_lavit.write([prompt], "compose", seed=1)[0].codes.tolist() for prompt in prompts]
    assert written[0] != written[1] and written[0] != written[2]
    for wrong in ("words", [], [1.5], [None]):
        with pytest.raises(RequestError, match="composed"):
            tiny_lavit.compose(wrong)


def test_guidance_and_negative_words_count(tiny_lavit):
    def codes(**options):
        return tiny_lavit.write([["a red apple"]], seed=2, **options)[0].codes.tolist()

    assert codes() != codes(guidance=1.0) and codes() != codes(negative="a blue fish") and codes() == codes()


def test_reconstruction_from_pictures_and_codes(tiny_lavit):
    pictures = [picture(1), picture(2)]
    rebuilt = tiny_lavit.reconstruct(pictures, seed=1)
    assert len(rebuilt) == 2 and same(rebuilt[1], tiny_lavit.reconstruct(pictures[1], seed=1)[0])
    codes = tiny_lavit.pictures.tokenize(pictures, seed=1)
    assert len(codes[0]) != len(codes[1])
    assert same(tiny_lavit.reconstruct([one.tolist() for one in codes], seed=1)[0], rebuilt[0])
    for wrong, words in (([[24]], "the code 24"), ([[]], "1 to 16"), ([[1] * 17], "1 to 16"), ([[-1]], "the code -1")):
        with pytest.raises(CodesError, match=words):
            tiny_lavit.reconstruct(wrong)


def test_wrong_settings_of_drawing_are_refused_before_the_model_writes(tiny_lavit, monkeypatch):
    monkeypatch.setattr(tiny_lavit.language, "write", lambda *_: pytest.fail("the model wrote"))
    for wrong, words in (({"ratio": "5:1"}, "5:1"), ({"ratio": "3:2", "height": 64, "width": 64}, "not both"),
                         ({"height": 60, "width": 64}, "multiple of 8"), ({"num_inference_steps": 0}, "at least 1"),
                         ({"codes": 8}, "no picture of the first"), ({"steps": 3}, "Unknown option 'steps'")):
        with pytest.raises(ConfigError, match=words):
            if "steps" in wrong:
                tiny_lavit.language.settings("draw", **wrong)
            tiny_lavit.draw("a red apple", **wrong)


def test_no_code_is_no_picture(tiny_lavit):
    """A model that ends at once."""
    weight = tiny_lavit.llm.lm_head.weight
    kept = weight.clone()
    with torch.no_grad():
        weight[tiny_lavit.tokenizer.vocabulary.code_start:] = 0
    try:
        with pytest.raises(GenerationError, match="wrote no image code"):
            tiny_lavit.draw("a red apple", guidance=1.0, min_new_tokens=0, max_new_tokens=2, temperature=0.0,
                            negative=None)
    finally:
        with torch.no_grad():
            weight.copy_(kept)


# ---- one message


def test_a_message_is_answered_whole_and_as_a_stream(tiny_lavit):
    for content in ([picture(1)], [picture(1), "What is this?"]):
        message = [{"role": "user", "content": content}]
        whole = tiny_lavit.chat(message, num_beams=1)
        events = list(tiny_lavit.chat(message, stream=True))
        assert "".join(event["text"] for event in events[:-1]) == whole.text == events[-1]["answer"].text
        assert len(events) > 2 and whole.text
    assert tiny_lavit.chat([{"role": "user", "content": [picture(1)]}]).text == tiny_lavit.describe(picture(1))


def test_a_message_is_answered_with_a_picture(tiny_lavit):
    events = list(tiny_lavit.chat([{"role": "user", "content": "a red apple"}], stream=True, force_image=True, seed=3))
    assert [event["type"] for event in events] == ["image_start", "image", "done"]
    assert same(events[1]["image"], tiny_lavit.draw("a red apple", seed=3))
    answer = tiny_lavit.chat([{"role": "user", "content": [picture(1), "snow"]}], force_image=True, ratio="3:2")
    assert answer.images[0].size == (80, 48) and 0 < len(answer.codes[0]) <= 16


def test_what_it_cannot_do_is_a_sentence(tiny_lavit):
    turn = {"role": "user", "content": "hello"}
    with pytest.raises(RequestError, match="show one with the message"):
        tiny_lavit.chat([turn])
    with pytest.raises(RequestError, match="single messages"):
        tiny_lavit.chat([turn, {"role": "assistant", "content": "hi"}, turn])
    with pytest.raises(ConfigError, match="without boxes"):
        tiny_lavit.detect(picture(1), "the cat")


# ---- files


def test_a_system_is_found_by_its_folder(tiny_lavit_folder, tiny_lavit):
    opened = open_system(tiny_lavit_folder, device="cpu", log=None)
    assert opened.describe(picture(1)) == tiny_lavit.describe(picture(1))
    half = open_pictures(tiny_lavit_folder, device="cpu", log=None)
    assert half.tokenize(picture(1))[0].tolist() == tiny_lavit.pictures.tokenize(picture(1))[0].tolist()


def test_missing_weights_say_what_to_put_where(tmp_path):
    with pytest.raises(CheckpointError, match="rain1011/LaVIT-7B-v2 into pretrained/LaVIT-7B-v2"):
        Lavit.from_pretrained("lavit")
    with pytest.raises(CheckpointError, match="nowhere"):
        Lavit.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no system"):
        Lavit.from_pretrained(tmp_path)


def test_a_system_that_only_reads_or_only_draws(damaged, tiny_lavit):
    shutil.rmtree(damaged / "decoder")
    reads = open_tiny(damaged)
    assert reads.describe(picture(1)) == tiny_lavit.describe(picture(1))
    with pytest.raises(CheckpointError, match="decoder of codes is not there: put it at .*decoder"):
        reads.draw("a red apple")
    for modes, works, refused in ((("understanding",), "describe", "reconstruct"),
                                  (("generation",), "reconstruct", "describe")):
        half = open_tiny(damaged, modes=modes)
        with pytest.raises(CheckpointError):
            getattr(half, refused)(picture(1))
        if works == "describe":
            assert half.describe(picture(1)) == tiny_lavit.describe(picture(1))


def test_a_tokenizer_without_the_second_stage_draws(damaged, tiny_lavit):
    from safetensors.torch import load_file, save_file

    (damaged / "tokenizer" / "visual_weight.safetensors").unlink()
    file = damaged / "tokenizer" / "model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if not name.startswith("vit_proj")}, file,
              {"model_type": "lavit_tokenizer"})
    draws = open_tiny(damaged)
    assert same(draws.draw("a red apple", seed=3), tiny_lavit.draw("a red apple", seed=3))
    with pytest.raises(CheckpointError, match="cannot describe"):
        draws.describe(picture(1))


def test_parts_of_other_sizes_are_refused(damaged, tmp_path):
    from seed_multimodal.language.lavit import LavitTokenizer

    LavitTokenizer.train(tiny_lavit.SENTENCES, tmp_path / "words", 330, 30, 16)
    with pytest.raises(CheckpointError, match="do not belong together"):
        open_tiny(damaged, words=tmp_path / "words")
    LavitTokenizer.train(tiny_lavit.SENTENCES, tmp_path / "fewer", 330, 20, 16)
    with pytest.raises(CheckpointError, match="24 codes"):
        open_tiny(damaged, words=tmp_path / "fewer")
    tiny_lavit.pixels(damaged / "pixels", lowres=True)
    with pytest.raises(CheckpointError, match="do not belong together"):
        open_tiny(damaged).draw("a red apple")


def test_a_damaged_system_json_is_a_sentence(damaged):
    for values, words in (({"system": "lavit", "llmm": "llm"}, "llmm"), ({"system": "lavit", "head": "middle"}, "head"),
                          ({"system": "lavit", "generation": {"paint": {}}}, "paint"),
                          ({"system": "lavit", "generation": {"draw": {"guidence": 2}}}, "guidence"),
                          ({"system": "seed_x"}, "no lavit")):
        (damaged / "system.json").write_text(json.dumps(values))
        with pytest.raises(ConfigError, match=words):
            open_tiny(damaged)


@pytest.mark.parametrize("head", ["highres", "lowres"])
def test_the_published_folder_opens_as_it_is(tmp_path, head):
    home = tiny_lavit.build_released(tmp_path / "LaVIT")
    spec = SystemConfig.find(home, system="lavit", head=head)
    spec.sizes = tiny_lavit.sizes(head)
    system = open_tiny(spec)
    assert system.describe(picture(1)) and system.draw("a red apple", ratio="3:2").size == (80, 48)
    (home / "language_model" / "visual_weight.bin").unlink()
    (home / "visual_tokenizer" / "config.json").write_text(json.dumps(asdict(tiny_lavit.TOKENIZER)))
    draws = open_tiny(spec)  # those sizes are the tokenizer's, not the decoder's in the same folder
    assert draws.draw("a red apple").size == (64, 64)
    with pytest.raises(CheckpointError, match=r"language_model/visual_weight\.bin"):
        draws.describe(picture(1))


def test_off_loaded_parts_and_two_names_of_one_part(tiny_lavit_folder, tiny_lavit):
    spared = open_tiny(tiny_lavit_folder, offload=True)
    assert spared.describe(picture(1)) == tiny_lavit.describe(picture(1))
    assert same(spared.draw("a red apple", seed=3), tiny_lavit.draw("a red apple", seed=3))
    assert tiny_lavit.pictures.writer.encoder is tiny_lavit.pictures.reader.encoder
    assert tiny_lavit.pictures.writer.causal_encoder is not tiny_lavit.pictures.reader.causal_encoder


def test_a_quantised_language_model(tiny_lavit_folder):
    pytest.importorskip("bitsandbytes")
    packed = open_tiny(tiny_lavit_folder, quantization="8bit")
    assert packed.llm.is_loaded_in_8bit and packed.describe(picture(1))


def test_answers_are_lemmatised_by_what_is_given(tiny_lavit_folder):
    system = open_tiny(tiny_lavit_folder)
    system.lemmatizer = Lemmatizer("none")
    plain = system.ask(picture(1), "What is this?")
    system.lemmatizer = lambda answer: f"<{answer}>"
    assert " ".join(system.ask(picture(1), "What is this?")[1:-1].lower().split()) == plain
