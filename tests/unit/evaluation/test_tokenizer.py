"""`seed eval tokenizer` and `prefix`: features, reports, bad samples, the shipped tokenizers."""

import base64
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from llm_runs import COLOURS
from PIL import Image
from random_images import noise
from repository import NANO
from tiny import read_json, write_json

from seed_multimodal.cli.main import main
from seed_multimodal.data.formats.pairs import open_pairs
from seed_multimodal.data.formats.record import as_list
from seed_multimodal.device import Runtime
from seed_multimodal.errors import DataError
from seed_multimodal.evaluation.prefix import class_columns
from seed_multimodal.evaluation.tokenizer import Pass, open_tokenizer, read_images, run_pass
from seed_multimodal.evaluation.tokenizer_settings import TokenizerSettings
from seed_multimodal.images.io import image_to_bytes
from seed_multimodal.images.transforms import seed_image_processor
from seed_nano.report.judge import Judge, find_judge
from seed_nano.report.reward import open_reward
from seed_nano.report.scoring import image_labels

CPU = Runtime(torch.device("cpu"), torch.float32)


def drawing(colour: str) -> bytes:
    canvas = Image.new("RGB", (24, 24), "white")
    canvas.paste(COLOURS[colour], (4, 4, 20, 20))
    return image_to_bytes(canvas)


@pytest.fixture
def listed(tmp_path) -> Path:
    """A json list of four images with two captions each, and one that is broken."""
    items = []
    for colour in COLOURS:
        (tmp_path / f"{colour}.png").write_bytes(drawing(colour))
        captions = [f"A {colour} square.", f"a square of {colour}"]
        items.append({"image": f"{colour}.png", "caption": captions})
    (tmp_path / "broken.png").write_bytes(drawing("red")[:40])
    items.insert(2, {"image": "broken.png", "caption": "a square"})
    write_json(tmp_path / "list.json", items)
    return tmp_path / "list.json"


@torch.no_grad()
def test_run_pass_equals_the_models_features(stages, listed):
    # Features in batches are those of the models on the same images.
    settings = TokenizerSettings(
        model=str(stages.tokenizer),
        data=str(listed),
        out="",
        decoder="none",
        clip="none",
        stage1=str(stages.stage1),
        text_tokenizer=str(stages.vocabulary),
    )
    opened = open_tokenizer(settings, CPU)
    source = open_pairs({"format": "auto", "files": str(listed)})
    encoded = run_pass(source, [4, 0, 1], opened, batch=2)
    assert encoded.captions[0] == ["A grey square.", "a square of grey"]

    # The same with the models, in one batch.
    features = encoded.features
    files = [listed.parent / f"{colour}.png" for colour in ("grey", "red", "green")]
    pixels = seed_image_processor(16).batch([Image.open(file).convert("RGB") for file in files])
    tokenizer = opened.codec.model
    stage1 = opened.stage1
    assert features["codes"].tolist() == tokenizer.encode(pixels).tolist()
    codes = torch.from_numpy(features["codes"])
    queries = tokenizer.rebuild_queries(
        tokenizer.decode_task_layer(tokenizer.quantize.lookup(codes))
    )
    expected = {
        "causal": stage1.vision_proj(
            stage1.query_features_from(stage1.visual_encoder(pixels))[:, -1]
        ),
        "rebuilt": stage1.vision_proj(queries[:, -1]),
        "decoded": tokenizer.decode(codes),
    }
    for name, embeddings in expected.items():
        np.testing.assert_allclose(features[name], F.normalize(embeddings, dim=-1), atol=1e-5)


@pytest.mark.parametrize("form", ["paths", "contents"])
def test_records_of_one_image_are_its_captions(listed, form):
    # As other images they would be ranked before it, and retrieval by any of its captions fail.
    items = json.loads(listed.read_text())
    records = [{**item, "caption": text} for item in items for text in as_list(item["caption"])]
    for record in records:
        if form == "contents":
            content = (listed.parent / record["image"]).read_bytes()
            record["image"] = base64.b64encode(content).decode()
    write_json(listed, records)
    source = open_pairs({"files": str(listed)})
    used = Pass()
    images = [*read_images(source, range(len(source)), 3, used, lambda line: None)]
    assert [len(batch) for batch in images] == [3, 1] and len(used.bad) == 1
    assert used.captions == [item["caption"] for item in items if item["image"] != "broken.png"]


def evaluate(stages, data: Path, out, *more: str) -> int:
    argv = (
        f"eval tokenizer --model {stages.tokenizer} --data {data} --stage1 {stages.stage1} "
        f"--text-tokenizer {stages.vocabulary} --decoder none --clip none --device cpu --out {out}"
    )
    return main([*argv.split(), *more])


def test_eval_tokenizer_writes_a_report(stages, listed, tmp_path, capsys):
    out = tmp_path / "out"
    assert evaluate(stages, listed, out) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out.splitlines()[-1])
    assert report == read_json(out / "report.json")
    # The broken image is named, and left out.
    assert (report["n"], report["captions"], len(report["left_out"])) == (4, 8, 1)
    assert "broken.png" in report["left_out"][0]
    assert "broken.png" in printed.err and "codes_by_blocks img_r1: " in printed.err
    assert list(report["retrieval"]) == ["causal_embeddings", "codes_by_blocks"]
    assert report["codes"]["codebook"] == 50
    assert Image.open(out / "reconstructions.jpg").width > 300
    # A second run adds its lines in LAVIS's format.
    assert evaluate(stages, listed, out) == 0
    logged = [json.loads(line) for line in (out / "evaluate.txt").read_text().splitlines()]
    assert [line["features"] for line in logged] == ["causal_embeddings", "codes_by_blocks"] * 2
    assert logged[0] == logged[2]
    assert {"txt_r1", "img_r10", "agg_metrics"} <= set(logged[0])


@pytest.mark.slow
def test_eval_tokenizer_of_nano(tmp_path):
    flags = f"--model {NANO} --data nano --out {tmp_path} --limit 60 --rebuild 12 --device cpu"
    assert main(["eval", "tokenizer", *flags.split()]) == 0
    text = (tmp_path / "report.json").read_text()
    assert "NaN" not in text
    report = json.loads(text)
    assert (report["n"], report["retrieval"]) == (60, {})  # nano has no text encoder
    # Images and embeddings are nearer to their own image than to others.
    for name in ("embedding", "image_clip"):
        section = report["reconstruction"][name]
        assert section["cosine"]["value"] > section["cosine_to_others"]["value"] + 0.2
    assert report["codes"]["distinct"] >= 54


@pytest.mark.slow
def test_eval_prefix_of_nano_and_its_sister(tmp_path):
    flags = f"--model {NANO} {NANO}-lavit --data nano --out {tmp_path} --limit 8 --device cpu"
    flags += " --judge nano --probe nano --probe-images 40"
    assert main(["eval", "prefix", *flags.split()]) == 0
    rows = read_json(tmp_path / "prefix.json")["prefixes"]
    assert [row["codes"] for row in rows] == [1, 2, 4, 8, 16, 32] * 2 + [1, 2, 4, 8, 16]
    # All codes hold the same in every order; a few hold more in their own.
    assert rows[3]["judge"]["value"] > rows[9]["judge"]["value"]
    for measure in ("psnr", "cosine", "r1", "probe", "judge"):
        assert rows[5][measure] == rows[11][measure], measure
        for first, last in ((0, 5), (12, 16)):
            assert rows[first][measure]["value"] < rows[last][measure]["value"], measure
    assert (tmp_path / "prefix.md").read_text().count("\n") == len(rows) + 2
    assert all(Image.open(tmp_path / f"{name}.png").width > 300 for name in ("curves", "sheet"))


def test_labels_are_matched_by_name():
    # Else a record with its labels in another order compares a style with a thing.
    rows = [{"thing": "fox", "style": "noto"}, {"style": "flat", "thing": "cat"}]
    assert class_columns(rows) == {"thing": ["fox", "cat"], "style": ["noto", "flat"]}
    assert class_columns([3, 4]) == {"0": [3, 4]}
    for other in ({"thing": "cat"}, {"thing": "cat", "colour": "red"}, {**rows[0], "style": None}):
        with pytest.raises(DataError, match="labels"):
            class_columns([rows[0], other])

    # The judge of nano as well.
    judge = Judge.from_pretrained(find_judge("nano"))
    labels = image_labels(judge, [noise(0)])[0]
    named = dict(reversed(list(zip(judge.config.labels, labels, strict=True))))
    for record in ({"labels": list(labels)}, {"labels": named}):
        reward = open_reward("nano", [record], torch.device("cpu"))
        assert reward([noise(0)], [record]) == [1.0]
    with pytest.raises(DataError, match="prompt None: .*labels"):
        open_reward("nano", [{"labels": {"thing": "fox"}}], torch.device("cpu"))


@pytest.mark.parametrize(
    "flag, value, name",
    [
        # Of another width.
        ("--decoder", str(NANO / "seed_tokenizer" / "diffusion_model"), "256"),
        ("--caption-key", "captoin", "captoin"),
    ],
)
def test_eval_tokenizer_with_a_wrong_argument(flag, value, name, stages, listed, tmp_path, capsys):
    assert evaluate(stages, listed, tmp_path / "out", flag, value) == 2
    error = capsys.readouterr().err
    assert name in error
    assert "Traceback" not in error
