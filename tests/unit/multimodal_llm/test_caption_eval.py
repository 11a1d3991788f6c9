"""The evaluation by captions (`--coco_caption_root`): scores in the log, captions on disk, the training untouched."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from seed_multimodal.data.stream.data_settings import read_data_settings
from seed_multimodal.errors import ConfigError, DataError
from seed_multimodal.training.llm.flags import translate

COUNT = 4


@pytest.fixture
def evaluation(tmp_path: Path, runs) -> list[str]:
    """Overrides of a run that captions four pictures, of which the record of one is broken."""
    draw = random.Random(3)

    def codes() -> list[int]:
        return [draw.randrange(runs.CODES) for _ in range(runs.PER_IMAGE)]

    records = [{"image_ids": codes(), "context": [{"image_ids": codes(), "text": "a red fox"}],
                "metadata": {"image_id": number}} for number in range(COUNT)]
    records.insert(2, {**records[0], "image_ids": [0] * 7})
    records.append({**records[0], "image_ids": codes()})  # the same picture again: captioned once
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    settings = {"sources": [{"name": "coco", "files": str(tmp_path / "eval.jsonl"), "decoder": "pretrain.caption_eval",
                             "options": {"num_context": 1, "caption_prompt": "a"}}]}
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "coco").mkdir()
    truth: dict[str, Any] = {"images": [{"id": number} for number in range(COUNT)], "annotations": [
        {"id": number, "image_id": number, "caption": f"a red fox sits on hill {number}"} for number in range(COUNT)]}
    (tmp_path / "coco" / "coco_karpathy_test_gt.json").write_text(json.dumps(truth))
    return [f"eval_data={tmp_path / 'eval.yaml'}", f"trainer.coco_caption_root={tmp_path / 'coco'}",
            "trainer.eval_steps=4"]


def scores(runs, output: Path) -> dict[int, dict[str, float]]:
    return {int(line["step"]): {key: value for key, value in line.items() if key.startswith("eval_")}
            for line in runs.log_lines(output) if any(key.startswith("eval_") for key in line)}


@pytest.mark.slow
def test_captions_are_scored_and_the_training_goes_on_as_without(train, runs, evaluation, capsys):
    # Checkpointing, bf16 and LoRA stand in the way of generation; later steps show what an evaluation left behind.
    changes = {"model": {"lora": runs.LORA, "gradient_checkpointing": True}, "trainer": {"precision": "bf16"}}
    output = train("scored", *evaluation, "trainer.max_steps=4", "trainer.eval_steps=2", **changes)
    assert "eval.jsonl: line 3: image_ids" in capsys.readouterr().out  # the broken record
    found = scores(runs, output)
    assert set(found) == {2, 4}
    assert set(found[4]) == {f"eval_{name}" for name in ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr")}
    captions = json.loads((output / "captions" / "step-4.json").read_text())
    assert sorted(one["image_id"] for one in captions) == list(range(COUNT))
    assert all(isinstance(one["caption"], str) and "<" not in one["caption"] for one in captions)
    assert json.loads((output / "summary.json").read_text())["evaluation"]["step"] == 4
    assert runs.losses(output) == runs.losses(train("alone", "trainer.max_steps=4", **changes))


def test_the_flag_and_the_released_pipe():
    made = translate(["--model", "m.yaml", "--coco_caption_root", "data/coco", "--evaluation_strategy", "steps",
                      "--eval_steps", "500"])
    assert made.values["trainer.coco_caption_root"] == "data/coco" and made.values["trainer.eval_steps"] == 500
    assert not [remark for remark in made.remarks if "coco" in remark]
    settings = read_data_settings({"_target_": "src.data.torchdata_train.build_coco_caption_eval_datapipes_for_llm",
                                   "data_dir": "coco", "num_context": 2, "caption_prompt": "a photo of"})
    (source,) = settings.sources
    assert source.decoder == "pretrain.caption_eval"
    assert source.options == {"num_context": 2, "caption_prompt": "a photo of"}


@pytest.mark.parametrize(("more", "sentence"), [
    (["trainer.coco_caption_root=nowhere"], r"nowhere is not there; put the reference captions there"),
    (["eval_data=DATA"], "every source holds prompts of the decoder")])
def test_what_cannot_be_captioned_is_refused_at_the_start(train, evaluation, more, sentence, tmp_path):
    with pytest.raises(ConfigError, match=sentence):
        train("refused", *evaluation, *(word.replace("DATA", str(tmp_path / "files" / "data.yaml")) for word in more))
    assert not (tmp_path / "refused" / "checkpoint-8").exists()


def test_a_picture_without_reference_is_named_at_the_start(train, evaluation, tmp_path):
    file = tmp_path / "coco" / "coco_karpathy_test_gt.json"
    truth = json.loads(file.read_text())
    truth["annotations"] = truth["annotations"][:-1]
    file.write_text(json.dumps(truth))
    with pytest.raises(DataError, match=r"eval.jsonl: line 5: its picture 3 has no caption in .*coco_karpathy_test_gt"):
        train("refused", *evaluation)


@pytest.mark.parametrize("name", [None, [1], {}, True, "", 1.5])
def test_an_image_id_that_names_no_picture_is_one_bad_record(train, evaluation, name, tmp_path, runs, capsys):
    prompts = tmp_path / "eval.jsonl"
    bad = json.loads(prompts.read_text().splitlines()[-1]) | {"metadata": {"image_id": name}}
    prompts.write_text(prompts.read_text() + json.dumps(bad) + "\n")
    output = train("out", *evaluation, "trainer.max_steps=1", "trainer.eval_steps=1")
    assert "metadata: image_id must be a number or a text" in capsys.readouterr().out
    assert len(json.loads((output / "captions" / "step-1.json").read_text())) == COUNT
