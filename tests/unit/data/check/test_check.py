"""`check_records` finds what it says it finds, names where, counts all of it, and passes good data of every kind."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from seed_multimodal.data.check.report import CheckReport, CheckSettings
from seed_multimodal.data.check.run import check_records
from seed_multimodal.data.formats.images import IMAGE_KEYS
from seed_multimodal.data.formats.shards import write_shard
from seed_multimodal.errors import CheckpointError, ConfigError, DataError
from seed_multimodal.language.tokenizer import MultimodalTokenizer

N_CODES, TOKENS = 64, 4


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("words")
    texts = ["a cat sits on the mat", "what is in the picture", "draw a red apple please"] * 20
    MultimodalTokenizer.train(texts, folder, vocab_size=300, n_codes=N_CODES, tokens_per_image=TOKENS)
    return folder


def picture(number: int, count: int = 1) -> list[int]:
    return [(number + place) % N_CODES for place in range(TOKENS * count)]


def jsonl(path: Path, *items: object) -> Path:
    path.write_text("".join((item if isinstance(item, str) else json.dumps(item)) + "\n" for item in items))
    return path


def check(*files: Path, **settings) -> CheckReport:
    return check_records(CheckSettings(files=list(files), **settings), progress=False)


def chat(question: list, answer: list, **more) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


GOOD = {
    "pretrain.caption": {"image_ids": picture(1), "text": "a cat"},
    "pretrain.interleaved": {"image_ids": [None, picture(2)], "texts": ["a cat", None], "metadata": {}},
    "pretrain.video": {"image_ids": picture(3, 2), "answer": "a cat sits"},
    "pretrain.text": {"text": "a cat sits on the mat"},
    "pretrain.retrieval": {"image_ids": picture(1), "text": "a cat",
                           "context": [{"image_ids": picture(5), "text": "a mat"}]},
    "sft.qa": {"image_ids": picture(4), "question": "what is it", "answer": "a cat"},
    "sft.edit": {"source_image_ids": picture(5), "target_image_ids": picture(6), "instruction": "make it red"},
    "sft.story": {"image_ids": picture(7, 5)} | {f"caption{n}": f"cat {n}" for n in range(5)},
    "sft.conversation": {"image_ids": picture(8), "question": "Question: what Question: where",
                         "answer": "Answer: a cat Answer: on the mat"},
    "sft.video": {"image_ids": picture(9, 3), "question": "what", "answer": "a cat"},
    "sft.visual_question": {"image_ids": [picture(10), picture(11)], "data": ["what", "cats"]},
    "sft.multi_edit": {"image_ids": picture(12, 4)} | {f"instruction{n}": "make it red" for n in range(3)},
    "chat": chat([{"codes": [picture(13), picture(14)]}, "what"], ["a cat", {"codes": picture(15)}]),
}


def test_good_records_of_every_kind_pass(tmp_path, tokenizer):
    path = jsonl(tmp_path / "good.jsonl", *GOOD.values())
    for settings in ({}, {"tokenizer": tokenizer, "length": 400}):
        report = check(path, **settings)
        assert report.findings == [] and report.wrong == 0
        assert report.records == len(GOOD)
    assert report.kinds == dict.fromkeys(GOOD, 1)
    assert report.images == 1 + 1 + 2 + 0 + 2 + 1 + 2 + 5 + 1 + 3 + 2 + 4 + 3
    assert report.lengths.total() == len(GOOD)
    caption = MultimodalTokenizer.from_pretrained(tokenizer).encode("a cat")
    assert check(jsonl(tmp_path / "one.jsonl", GOOD["pretrain.caption"]),
                 tokenizer=tokenizer).lengths == {1 + TOKENS + 2 + len(caption) + 1: 1}


@pytest.mark.parametrize("name", [name for name in GOOD if name != "pretrain.video"])
def test_the_decoder_that_is_guessed_can_be_named(tmp_path, tokenizer, name):
    report = check(jsonl(tmp_path / "a.jsonl", GOOD[name]), decoder=name, tokenizer=tokenizer)
    assert report.findings == [] and report.kinds == {name: 1}


BAD = [
    ('{"text": "a', "malformed json", "is not json"),
    ("[1]", "malformed json", "holds a list"),
    ({"image": __file__}, "missing key", "has no caption key 'caption' .it has image."),
    ({"image": __file__, "caption": None}, "missing key", "has no caption, its 'caption' is null"),
    ({"image": __file__, "caption": "a"}, "broken picture", "not a picture"),
    ({"file_name": "gone.jpg", "text": "a"}, "missing picture", "gone.jpg is not there"),
    ({"image": "", "caption": "a"}, "missing picture", "its 'image' is empty"),
    ({"picture": [1], "words": "a"}, "missing key", "picture, words.* no known kind"),
    ({"image_ids": [0, 1, 2, N_CODES], "text": "a"}, "codes out of range", f"code {N_CODES} is out of range .0 to 63"),
    ({"image_ids": [0, -1, 2, 3], "text": "a"}, "codes out of range", "code -1"),
    ({"image_ids": [0, 1, 2], "text": "a"}, "number of codes", "has 3 codes; a picture has 4"),
    ({"image_ids": picture(1, 2), "text": "a"}, "number of codes", "has 8 codes; a picture has 4"),
    ({"image_ids": [], "text": "a"}, "number of codes", "has 0 codes"),
    ({"image_ids": [1, 2.5, 3, 4], "text": "a"}, "wrong type", "no list of whole numbers"),
    ({"image_ids": "1 2 3 4", "text": "a"}, "wrong type", "no list of whole numbers"),
    (GOOD["sft.story"] | {"image_ids": picture(1, 4)}, "number of codes", "has 16 codes; .* holds 5"),
    ({"image_ids": picture(1), "text": " ,. "}, "empty text", "'text' is empty"),
    ({"image_ids": picture(1), "question": "", "answer": "a"}, "empty text", "'question' is empty"),
    ({"image_ids": picture(1), "text": 7}, "wrong type", "'text' is a int"),
    (chat([{"codes": picture(1)}, "a"], [{"codes": [1]}]), "number of codes", "turn 2: has 1 codes"),
    (chat([{"codes": [picture(1), [99] * 4]}, "a"], ["b"]), "codes out of range", "turn 1: code 99"),
    (chat(["<image> and <image>"], ["b"], image=["a.jpg"]), "images and placeholders", "2 <image> .* for 1 picture"),
    (chat(["a"], [" "]), "empty text", "turn 2"),
    (chat(["a", {"image": "nowhere.jpg"}], ["b"]), "missing picture", "nowhere.jpg is not there"),
    (chat(["a", {"image": "http://x/y.jpg"}], ["b"]), "missing picture", "is an address"),
    ({"text": "a cat " * 40}, "too long", r"has \d+ tokens, more than 40"),
    ({"image_ids": [picture(1), None], "texts": ["a", "b"], "metadata": {}}, "dropped|.*", "line 1: "),
]


@pytest.mark.parametrize(("item", "kind", "words"), BAD)
def test_what_is_wrong_is_named_with_its_line(tmp_path, tokenizer, item, kind, words):
    path = jsonl(tmp_path / "bad.jsonl", item, "", GOOD["pretrain.caption"])
    report = check(path, tokenizer=tokenizer, length=40)
    assert report.wrong == 1, report.findings
    (finding,) = report.findings
    assert finding.sentence.startswith(f"{path}: line 1: ") and "\n" not in finding.sentence
    assert re.fullmatch(kind, finding.kind) and re.search(words, finding.sentence)
    assert report.records == 2 and report.lengths.total() == (2 if kind == "too long" else 1)


def test_without_a_tokenizer_the_first_picture_tells_the_length(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", GOOD["pretrain.caption"], {"image_ids": [1, 2, 3], "text": "a"},
                 {"image_ids": [1, 2, 3, 10**6], "text": "a"}, {"image_ids": [1, 2, 3, -1], "text": "a"})
    report = check(path)
    assert [finding.sentence for finding in report.findings] == [
        f"{path}: line 2: image_ids: has 3 codes; a picture has 4 (as the first one that was read).",
        f"{path}: line 4: image_ids: code -1 is out of range (at least 0)."]
    assert not report.lengths and report.as_json()["lengths"] is None


def test_a_named_decoder_asks_for_its_keys(tmp_path, tokenizer):
    path = jsonl(tmp_path / "a.jsonl", GOOD["pretrain.caption"])
    for settings in ({}, {"tokenizer": tokenizer}):
        report = check(path, decoder="sft.edit", **settings)
        assert [finding.kind for finding in report.findings] == ["missing key"] * 3
        assert "has no key 'source_image_ids', which decoder sft.edit needs" in report.findings[0].sentence
    clip = jsonl(tmp_path / "b.jsonl", GOOD["pretrain.video"])
    assert check(clip, decoder="pretrain.video", options={"num_frames": 2}, tokenizer=tokenizer).wrong == 0
    assert check(clip, decoder="pretrain.video", options={"num_frames": 3}, tokenizer=tokenizer).wrong == 1
    with pytest.raises(ConfigError, match="did you mean 'num_frames'"):
        check(clip, decoder="pretrain.video", options={"numframes": 3}, tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="--option needs --decoder"):
        check(clip, options={"num_frames": 3}, tokenizer=tokenizer)
    for wrong in ({}, {"tokenizer": tokenizer, "stage": "caption"}):
        with pytest.raises(ConfigError, match="seed_x.chat needs --tokenizer"):
            check(clip, decoder="seed_x.chat", **wrong)
    with pytest.raises(ConfigError, match="no decoder 'sft.edits'.*did you mean 'sft.edit'"):
        check(path, decoder="sft.edits")


def test_ids_that_are_there_twice_across_files(tmp_path):
    first = jsonl(tmp_path / "a.jsonl", {"id": "x", "text": "a"}, "", {"id": 7, "text": "b"}, {"text": "no id"})
    second = tmp_path / "b.json"
    second.write_text(json.dumps([{"id": "y", "text": "a"}, {"id": "7", "text": "c"}, {"id": "y", "text": "d"}]))
    third = tmp_path / "c.tar"
    write_shard(third, [(key, {"json": b'{"text": "a"}'}) for key in ("k1", "k2", "k1")])
    report = check(first, second, third)
    assert report.errors == {"duplicate id": 3} and report.records == 9
    assert [finding.sentence for finding in report.findings] == [
        f"{second}: item 1: id 7 is there already, in {first}: line 3.",
        f"{second}: item 2: id y is there already, in {second}: item 0.",
        f"{third}: sample k1: id k1 is there already, in {third}: sample k1."]
    (tmp_path / "val").mkdir()
    for path in (tmp_path / "d.tar", tmp_path / "val" / "d.tar"):
        write_shard(path, [("k2", {"json": b'{"text": "a"}'})])
    report = check(third, tmp_path / "d.tar", tmp_path / "val" / "d.tar")  # keys are numbered anew in each folder
    assert [finding.sentence for finding in report.findings[1:]] == [
        f"{tmp_path}/d.tar: sample k2: id k2 is there already, in {third}: sample k2."]


def test_pictures_are_looked_for_where_they_were_said_to_be(tmp_path, jpeg):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.jpg").write_bytes(jpeg(0))
    items = [{"id": str(n), "image": name, "conversations": [
        {"from": "human", "value": "<image>\nwhat"}, {"from": "gpt", "value": "a"}]}
        for n, name in enumerate(("a.jpg", "b.jpg"))]
    path = tmp_path / "llava.json"
    path.write_text(json.dumps(items))
    report = check(path, images=tmp_path / "pictures")
    assert [finding.sentence for finding in report.findings] == [
        f"{path}: item 1: the picture b.jpg is not there, below {tmp_path}/pictures."]
    assert report.images == 2 and report.kinds == {"chat (not tokenised)": 2}
    assert check(path).errors == {"missing picture": 2} and "--images" in check(path).findings[0].sentence
    raw = jsonl(tmp_path / "qa.jsonl", {"image": "pictures/a.jpg", "question": "q", "answer": "a"},
                {"image": "pictures/a.jpg", "caption": " "}, {"image_ids": [1], "image": "gone.jpg", "text": "a"})
    report = check(raw)
    assert report.errors == {"empty text": 1} and report.opened == 1
    assert report.kinds == {"qa (not tokenised)": 1, "tokenizer (not tokenised)": 1, "pretrain.caption": 1}


def test_pictures_that_are_still_files_count_with_their_length(tmp_path, tokenizer, jpeg):
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    with_file = check(jsonl(tmp_path / "a.jsonl", chat([{"image": "a.jpg"}, "what"], ["a cat"])), tokenizer=tokenizer)
    with_codes = check(jsonl(tmp_path / "b.jsonl", chat([{"codes": picture(1)}, "what"], ["a cat"])),
                       tokenizer=tokenizer)
    assert with_file.wrong == 0 and with_file.lengths == with_codes.lengths


def test_a_broken_file_does_not_stop_the_others(tmp_path):
    write_shard(tmp_path / "a.tar", [(f"{n}", {"json": b'{"text": "a"}'}) for n in range(5)])
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "b.tar").write_bytes(whole[:3000])
    write_shard(tmp_path / "c.tar", [("k", {"pkl": b"."})])
    write_shard(tmp_path / "d.tar", [("z", {"json": b'{"text": "a"}'})])
    report = check(tmp_path)
    assert report.files == 4 and report.records == 10  # the torn sample is one
    assert report.errors == {"damaged file": 1, "pickled": 1, "duplicate id": 2}
    assert "b.tar: torn or damaged after sample" in report.findings[2].sentence
    assert "seed data convert" in report.findings[3].sentence
    (tmp_path / "e.json").write_text('[{"text": "a"},\n{"text": ]')
    (finding,) = check(tmp_path / "e.json").findings
    assert finding.kind == "malformed json" and "e.json: line 2: is not json" in finding.sentence


def test_sentences_are_capped_but_everything_is_counted(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", *["{"] * 30)
    assert (len(check(path, max_errors=3).findings), check(path, max_errors=3).wrong) == (3, 30)
    assert len(check(path, max_errors=0).findings) == 30


def test_lengths_are_summed_up(tmp_path):
    report = CheckReport()
    report.lengths.update({10: 5, 32: 1, 33: 2, 64: 1, 65: 1, 1000: 10})
    assert report.histogram() == [(0, 32, 6), (33, 64, 3), (65, 128, 1), (129, 256, 0), (257, 512, 0), (513, 1024, 10)]
    assert (report.length_at(0.25), report.length_at(0.5), report.length_at(1.0)) == (10, 65, 1000)
    assert report.as_json()["lengths"]["tokens"] == 50 + 32 + 66 + 64 + 65 + 10_000


def test_what_cannot_be_checked_is_refused(tmp_path, tokenizer):
    path = jsonl(tmp_path / "a.jsonl", {"text": "a"})
    with pytest.raises(ConfigError, match="--length needs --tokenizer"):
        check(path, length=5)
    with pytest.raises(CheckpointError):
        check(path, tokenizer=tmp_path)
    with pytest.raises(DataError, match="there is no such file or folder"):
        check(tmp_path / "none.jsonl")


def test_a_list_of_captions_is_good_where_its_decoder_draws_one(tmp_path, tokenizer):
    path = jsonl(tmp_path / "a.jsonl", {"image_ids": picture(1), "text": ["a cat", "the cat"]},
                 {"image_ids": picture(1), "text": ["a cat", " "]}, {"image_ids": picture(1), "text": ["a cat", 3]},
                 {"image_ids": picture(1), "text": []})
    for words in (None, tokenizer):
        report = check(path, tokenizer=words)
        assert report.errors == {"empty text": 1, "wrong type": 2}
        assert all("line 1:" not in one.sentence for one in report.findings)


@pytest.mark.parametrize("views", [[], None])
def test_views_that_are_empty_are_no_picture(tmp_path, tokenizer, views):
    path = jsonl(tmp_path / "a.jsonl", {"views": views, "text": "a cat"})
    for words in (None, tokenizer):
        assert check(path, tokenizer=words).errors == {"missing key": 1}


@pytest.mark.parametrize("codes", [[picture(1), None], [[], [], 1.5], [None, picture(1)]])
def test_pictures_of_mixed_types_are_told(tmp_path, tokenizer, codes):
    path = jsonl(tmp_path / "a.jsonl", {"image_ids": codes, "question": "what", "answer": "a cat"})
    assert check(path, tokenizer=tokenizer).wrong


def test_a_picture_written_into_its_list_is_told_briefly(tmp_path, tokenizer):
    path = jsonl(tmp_path / "a.jsonl", {"image": "A" * 9000, "conversations": [
        {"from": "human", "value": "<image>what"}, {"from": "gpt", "value": "a cat"}]})
    report = check(path, tokenizer=tokenizer)  # it is base64, of no picture
    assert report.errors == {"broken picture": 1} and len(report.findings[0].sentence) < 400 + len(str(path))


def test_a_sample_of_the_pictures_is_opened_or_all(tmp_path, jpeg):
    for name, count in (("a", 60), ("b", 25)):
        samples = [(f"{name}{n:02d}", {"jpg": jpeg(n), "txt": b"a text", "json": b'{"width": 64}'})
                   for n in range(count)]
        samples[7][1]["jpg"] = samples[7][1]["jpg"][:-400]
        write_shard(tmp_path / f"{name}.tar", samples)
    for wanted, opened, broken in ((20, 10 + 9, 0), (None, 85, 2), (0, 0, 0), (2, 2, 0), (200, 85, 2)):
        report = check(tmp_path, pictures=wanted)
        assert (report.images, report.opened, report.errors["broken picture"]) == (85, opened, broken)
        assert report.wrong == broken and report.kinds == {"tokenizer (not tokenised)": 85}


def test_pictures_of_a_shard_are_those_of_a_folder(tmp_path, jpeg):
    for ending in ("gif", "BMP", "tiff", "avif"):
        (tmp_path / "a").mkdir(exist_ok=True)
        Image.open(io.BytesIO(jpeg(0))).save(tmp_path / "a" / f"{ending}.{ending}")
        (tmp_path / "a" / f"{ending}.txt").write_text("words")
    samples = [(path.stem, {path.suffix[1:]: path.read_bytes(), "txt": b"words"})
               for path in sorted((tmp_path / "a").iterdir()) if path.suffix != ".txt"]
    write_shard(tmp_path / "a.tar", [*samples, ("alone", {"txt": b"no picture"})])
    assert check(tmp_path / "a").errors == {} and check(tmp_path / "a").opened == len(samples) == 4
    report = check(tmp_path / "a.tar")
    assert report.opened == 4 and report.kinds == {"tokenizer (not tokenised)": 5}
    assert [finding.sentence for finding in report.findings] == [
        f"{tmp_path}/a.tar: sample alone: has no picture: no .{', .'.join(IMAGE_KEYS)} member."]


def test_the_training_takes_no_pictures_without_codes(tmp_path, jpeg):
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    talk = jsonl(tmp_path / "a.jsonl", chat(["a", {"image": "a.jpg"}], ["b"]))
    assert check(talk).errors == {} and check(talk, stage="llm").errors == {"not tokenised": 1}


def test_fields_and_stages_that_do_not_exist_are_refused(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"picture": "a.jpg", "title": "a"})
    for settings, words in (({"stage": "captoin"}, "did you mean 'caption'"), ({"fields": {"image": "x"}}, "--stage"),
                            ({"stage": "tokenizer", "fields": {"imag": "x"}}, "did you mean 'image'"),
                            ({"stage": "qa", "fields": "vqq"}, "did you mean 'vqa'")):
        with pytest.raises(ConfigError, match=words):
            check(path, **settings)
    fields = {"image": "picture", "caption": "title"}
    for stage in ("tokenizer", "caption"):
        assert check(path, stage=stage, fields=fields).errors == {"missing picture": 1}


def test_an_empty_id_is_none(tmp_path: Path, lines: Callable) -> None:
    lines(tmp_path / "a.jsonl", ['{"id": "", "text": "a"}', '{"id": "", "text": "b"}', '{"id": NaN, "text": "c"}',
                                 '{"id": NaN, "text": "d"}', '{"id": 0, "text": "e"}', '{"id": 0, "text": "f"}'])
    report = check_records(CheckSettings([tmp_path / "a.jsonl"]), progress=False)
    assert report.errors == {"duplicate id": 1} and "line 6: id 0" in report.findings[0].sentence


def test_control_words_in_texts_are_told_but_not_wrong(tmp_path, tokenizer):
    path = jsonl(tmp_path / "a.jsonl", {"image_ids": picture(1), "text": "a cat</s>"}, {"text": "<s>old</s> new <b>"},
                 {"image_ids": picture(2), "question": "what", "answer": "<img_00001> <img_00002> <img_99999>"},
                 {"image_ids": picture(3), "text": ["a", "draw <img>"]}, {"text": "a < b > c"},
                 {"texts": ["a", "b</s>"], "image_ids": [None, None], "metadata": {}}, chat(["say </s>"], ["</s>"]),
                 {"instruction": "draw", "response": "<img><img_00001><img_00002><img_00003><img_00004></img></s>"})
    for words, codes in ((tokenizer, 2), (None, 3)):  # the tokenizer has no code 99,999; without one it may be
        report = check(path, tokenizer=words)
        assert report.control.records == 6
        assert report.control.words == {"</s>": 4, "<s>": 1, "<img_…>": codes, "<img>": 1}
        assert report.control.first == [f"{path}: line 1: </s> in 'text'", f"{path}: line 2: <s> in 'text'",
                                        f"{path}: line 3: <img_00001> in 'answer'"]
    assert report.as_json()["control_words"]["records"] == 6
    assert check(jsonl(tmp_path / "b.jsonl", *GOOD.values()), tokenizer=tokenizer).control.sentence() == ""
