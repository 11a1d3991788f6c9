"""`seed eval tokenizer`: features, reports, bad samples, the shipped tokenizer."""

from __future__ import annotations

import argparse
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pyarrow import parquet
from repository import NANO
from tiny.seed import SIZES, loud
from tiny.vision import write_vision

from seed_multimodal.cli.evaluate import data_spec
from seed_multimodal.cli.main import main
from seed_multimodal.data.formats.pairs import open_pairs
from seed_multimodal.device import Runtime
from seed_multimodal.errors import DataError
from seed_multimodal.evaluation.tokenizer import (
    TokenizerOptions,
    _retrieval,
    open_tokenizer,
    run_pass,
)
from seed_multimodal.images.transforms import ImageTransform, seed_image_processor
from seed_multimodal.models.seed.checkpoints import load_vision
from seed_multimodal.models.seed.configuration import Seed2Config
from seed_multimodal.models.seed.losses import Stage1Model
from seed_multimodal.models.seed.modeling import Seed2Tokenizer
from seed_multimodal.nn.vision.hub import HubVisionConfig

CPU = Runtime(torch.device("cpu"), torch.float32)
COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 160, 40),
    "blue": (30, 40, 220),
    "grey": (128, 128, 128),
}


def drawing(colour: str) -> bytes:
    canvas = Image.new("RGB", (24, 24), "white")
    canvas.paste(COLOURS[colour], (4, 4, 20, 20))
    data = io.BytesIO()
    canvas.save(data, "PNG")
    return data.getvalue()


@pytest.fixture
def listed(tmp_path) -> Path:
    """A json list of four images with two captions each, and one that is broken."""
    items = []
    for colour in COLOURS:
        (tmp_path / f"{colour}.png").write_bytes(drawing(colour))
        items.append(
            {"image": f"{colour}.png", "caption": [f"A {colour} square.", f"a square of {colour}"]}
        )
    (tmp_path / "broken.png").write_bytes(drawing("red")[:40])
    items.insert(2, {"image": "broken.png", "caption": "a square"})
    (tmp_path / "list.json").write_text(json.dumps(items))
    return tmp_path / "list.json"


def source_of(file: Path):
    return open_pairs({"format": "auto", "files": str(file)})


def test_run_pass_equals_the_models_features(stages, listed):
    options = TokenizerOptions(
        "none", "none", stage1=stages.stage1, text_tokenizer=stages.vocabulary
    )
    opened = open_tokenizer(stages.tokenizer, CPU, options)
    encoded = run_pass(source_of(listed), [4, 0, 1], opened, batch=2)
    assert encoded.rows == [4, 0, 1] and encoded.captions[0] == [
        "A grey square.",
        "a square of grey",
    ]
    pixels = torch.stack(
        [
            seed_image_processor(16)(Image.open(listed.parent / f"{c}.png").convert("RGB"))
            for c in ("grey", "red", "green")
        ]
    )
    tokenizer = opened.codec.model
    stage1 = opened.stage1
    features = encoded.features
    assert features["codes"].tolist() == tokenizer.encode(pixels).tolist()
    causal = F.normalize(
        stage1.vision_proj(stage1.query_features_from(stage1.visual_encoder(pixels))[:, -1]), dim=-1
    )
    np.testing.assert_allclose(features["causal"], causal.detach().numpy(), atol=1e-5)
    up = tokenizer.decode_task_layer(tokenizer.quantize.lookup(torch.from_numpy(features["codes"])))
    rebuilt = F.normalize(stage1.vision_proj(tokenizer.rebuild_queries(up)[:, -1]), dim=-1)
    np.testing.assert_allclose(features["rebuilt"], rebuilt.detach().numpy(), atol=1e-5)
    decoded = F.normalize(tokenizer.decode(torch.from_numpy(features["codes"])), dim=-1)
    np.testing.assert_allclose(features["decoded"], decoded.numpy(), atol=1e-5)


@pytest.mark.parametrize("kind", ["siglip2", "dinov2", "dinov3"])
@pytest.mark.parametrize("has_vision", [False, True])
def test_run_pass_with_a_vision_encoder_of_transformers(
    kind, has_vision, listed, clip_folder, tmp_path
):
    """Stage 1 has the tokenizer's encoder or its own; the target CLIP sees the encoder's view."""
    write_vision(kind, tmp_path / "vision")
    vit = HubVisionConfig(path=str(tmp_path / "vision"))
    config = Seed2Config(**{**SIZES, "vit": vit}, image_features_dim=8)
    tokenizer = loud(Seed2Tokenizer(config)).eval()
    load_vision(tokenizer.visual_encoder, tmp_path / "vision", None)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    vocabulary = "a red green blue grey square of".split()
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *vocabulary]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces) + "\n")
    stage1 = loud(Stage1Model(config, vocab_size=len(pieces) + 1, embed_dim=8)).eval()
    load_vision(stage1.visual_encoder, tmp_path / "vision", None)
    state = stage1.state_dict()
    if not has_vision:
        state = {name: state[name] for name in state if not name.startswith("visual_encoder.")}
    torch.save({"model": state}, tmp_path / "stage1.pth")
    shutil.rmtree(tmp_path / "vision")

    options = TokenizerOptions(
        "none", clip_folder, stage1=tmp_path / "stage1.pth", text_tokenizer=tmp_path
    )
    opened = open_tokenizer(tmp_path / "tokenizer", CPU, options)
    encoded = run_pass(source_of(listed), [0, 1, 3], opened)
    images = [Image.open(listed.parent / f"{c}.png").convert("RGB") for c in ("red", "green")]
    pixels = vit.preprocessing.batch(images)
    with torch.no_grad():
        assert encoded.features["codes"][:2].tolist() == tokenizer.encode(pixels).tolist()
        queries = stage1.query_features_from(stage1.visual_encoder(pixels))
        causal = F.normalize(stage1.vision_proj(queries[:, -1]), dim=-1)
        np.testing.assert_allclose(encoded.features["causal"][:2], causal.numpy(), atol=1e-4)
        target = opened.target.model(vit.preprocessing.convert(pixels, ImageTransform(16)))
        target = F.normalize(target.image_embeds, dim=-1)
    np.testing.assert_allclose(encoded.features["target"][:2], target.numpy(), atol=1e-4)
    retrieval = _retrieval(encoded, opened)
    assert set(retrieval) == {"causal_embeddings", "codes_by_blocks"}


def test_run_pass_fails_after_many_bad_images_in_a_row(stages, tmp_path):
    (tmp_path / "list.json").write_text(
        json.dumps([{"image": f"{i}.png", "caption": "a"} for i in range(30)])
    )
    opened = open_tokenizer(stages.tokenizer, CPU, TokenizerOptions("none", "none"))
    with pytest.raises(DataError, match="20 samples in a row cannot be used"):
        run_pass(source_of(tmp_path / "list.json"), range(30), opened)
    with pytest.raises(DataError, match="none of the 3 samples could be used"):
        run_pass(source_of(tmp_path / "list.json"), range(3), opened)


def test_run_pass_names_images_with_nan_features(stages, listed):
    opened = open_tokenizer(stages.tokenizer, CPU, TokenizerOptions("none", "none"))
    opened.codec.model.distill_image_proj.bias.data[3] = torch.nan
    with pytest.raises(
        DataError,
        match="item 1 or the images after it: 'decoded' holds numbers that are not finite",
    ):
        run_pass(source_of(listed), [1, 0], opened)


def test_data_spec_of_each_kind_of_data(tmp_path):
    def spec(data: str, **options: str) -> dict:
        flags = (
            dict.fromkeys(("split", "image_root", "image_key", "caption_key", "captioned"))
            | options
        )
        return data_spec(argparse.Namespace(data=data, **flags))

    assert spec("nano") == {"format": "nano", "split": "val"}
    assert spec("a/{0..3}.tar", caption_key="top_caption") == {
        "format": "auto",
        "files": "a/{0..3}.tar",
        "caption_key": "top_caption",
    }
    (tmp_path / "data.yaml").write_text("format: tar\nfiles: x/*.tar\n")
    assert spec(str(tmp_path / "data.yaml")) == {"format": "tar", "files": "x/*.tar"}


def run(stages, data: Path | str, out: Path, *more: str) -> int:
    return main(
        [
            *(
                f"eval tokenizer --model {stages.tokenizer} --data {data} "
                f"--stage1 {stages.stage1} --text-tokenizer {stages.vocabulary} --decoder none "
                f"--clip none --device cpu --out {out}"
            ).split(),
            *more,
        ]
    )


@pytest.mark.process
def test_eval_tokenizer_writes_a_report(stages, listed, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(stages, listed, out) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report == json.loads((out / "report.json").read_text())
    assert (report["n"], report["captions"], len(report["left_out"])) == (4, 8, 1)
    assert "broken.png" in report["left_out"][0] and "left out: " in printed.err
    assert list(report["retrieval"]) == ["causal_embeddings", "codes_by_blocks"]
    assert (
        report["reconstruction"] == {"clip": "", "rebuilt": 0} and report["codes"]["codebook"] == 50
    )
    assert Image.open(out / "reconstructions.jpg").width > 300
    assert run(stages, listed, out) == 0
    logged = [json.loads(line) for line in (out / "evaluate.txt").read_text().splitlines()]
    assert [line["features"] for line in logged] == ["causal_embeddings", "codes_by_blocks"] * 2
    assert logged[0] == logged[2] and {"txt_r1", "img_r10", "agg_metrics"} <= set(logged[0])


def folder_of(folder: Path, form: str) -> str:
    """Images with captions in a format of `--data`, one of them broken and one without a
    caption."""
    folder.mkdir()
    names = [*COLOURS, "cut", "bare"]
    data = {name: drawing(name if name in COLOURS else "red") for name in names}
    data["cut"] = data["cut"][:40]
    captions = {name: f"a {name} square" for name in names if name != "bare"}
    if form == "parquet":
        rows = [
            {"image": {"bytes": data[name], "path": name}, "text": captions.get(name)}
            for name in names
        ]
        parquet.write_table(
            pyarrow.Table.from_pylist(rows), folder / "train.parquet", row_group_size=2
        )
        return str(folder)
    for name in names:
        (folder / f"{name}.png").write_bytes(data[name])
        if form == "txt" and name in captions:
            (folder / f"{name}.txt").write_text(captions[name])
    if form != "txt":
        (folder / form).write_text(
            "".join(
                json.dumps({"file_name": f"{name}.png", "text": captions.get(name)}) + "\n"
                for name in names
            )
        )
    return str(folder)


@pytest.mark.process
@pytest.mark.parametrize("form", ["txt", "metadata.jsonl", "parquet"])
def test_eval_tokenizer_of_folders_and_tables(stages, tmp_path, capsys, form):
    assert run(stages, folder_of(tmp_path / "own", form), tmp_path / "out") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["n"], report["captions"], len(report["left_out"])) == (
        len(COLOURS),
        len(COLOURS),
        2,
    )
    reasons = " ".join(report["left_out"])
    assert "not an image" in reasons and re.search(r"has no (caption|\.txt)", reasons)


@pytest.mark.process
def test_eval_tokenizer_of_images_without_captions(stages, listed, tmp_path, capsys):
    listed.unlink()
    assert run(stages, tmp_path, tmp_path / "out", "--no-captions") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["n"], report["captions"], report["retrieval"]) == (4, 0, {})


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("limit", ["60", "1"])
def test_eval_tokenizer_of_nano(tmp_path, limit):
    assert (
        main(
            (
                f"eval tokenizer --model {NANO} --data nano --out {tmp_path} --limit {limit} "
                "--rebuild 12 --device cpu"
            ).split()
        )
        == 0
    )
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["data"] == {"format": "nano", "split": "val"} and report["n"] == int(limit)
    assert report["retrieval"] == {}  # nano has no text encoder
    assert "NaN" not in (tmp_path / "report.json").read_text()
    for name in ("embedding", "image_clip"):
        near = report["reconstruction"][name]
        assert near["cosine_to_others"]["n"] == (0 if limit == "1" else near["n"])
        assert near["cosine"]["value"] > (near["cosine_to_others"]["value"] or 0) + 0.2
    assert report["codes"]["distinct"] >= 0.9 * int(limit)


def test_eval_tokenizer_with_wrong_arguments(stages, listed, tmp_path, capsys):
    image_encoder = NANO / "seed_tokenizer" / "diffusion_model"
    for arguments, sentence in (
        (["--model", str(tmp_path / "absent")], "no such folder"),
        (["--data", "elsewhere.txt"], "no such file or folder"),
        (
            ["--clip", str(image_encoder / "image_encoder")],
            "of width 256, this tokenizer decodes to width 10",
        ),
        (
            ["--decoder", str(image_encoder)],
            "embeddings have width 10, but this diffusion model needs width 256",
        ),
        (["--caption-key", "captoin"], "'captoin'"),
    ):
        assert run(stages, listed, tmp_path / "out", *arguments) == 2
        error = capsys.readouterr().err
        assert sentence in error and "Traceback" not in error
