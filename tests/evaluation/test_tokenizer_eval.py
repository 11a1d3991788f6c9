"""A tokenizer's evaluation: the released retrieval rules by hand, every route, real runs on files of each format."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pyarrow import parquet

from seed_multimodal.cli import main
from seed_multimodal.commands.eval_tokenizer import data_spec
from seed_multimodal.data.formats.pairs import open_pairs
from seed_multimodal.device import Runtime
from seed_multimodal.errors import CheckpointError, DataError
from seed_multimodal.evaluation.tokenizer_eval import EvalSettings, evaluate_tokenizer
from seed_multimodal.evaluation.tokenizer_open import open_tokenizer
from seed_multimodal.evaluation.tokenizer_pass import choose_rows, run_pass
from seed_multimodal.evaluation.tokenizer_retrieval import K_TEST, Captions, retrieval, score_matrix
from seed_multimodal.evaluation.tokenizer_text import clip_texts, find_words, load_stage1, stage1_texts
from seed_multimodal.images.transforms import seed_image_processor
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.tokenizers.qformer import QFormerConfig
from seed_multimodal.tokenizers.seed2 import Seed2Config, Seed2Tokenizer
from seed_multimodal.tokenizers.stage1 import Stage1Model
from seed_multimodal.vision.eva import EvaConfig

ROOT = Path(__file__).parents[2]
NANO = ROOT / "pretrained" / "nano"
CPU = Runtime(torch.device("cpu"), torch.float32)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "green", "blue", "grey", "square", "of"]
COLOURS = {"red": (220, 30, 30), "green": (30, 160, 40), "blue": (30, 40, 220), "grey": (128, 128, 128)}
METRICS = ["txt_r1", "txt_r5", "txt_r10", "txt_r_mean", "img_r1", "img_r5", "img_r10", "img_r_mean", "r_mean",
           "agg_metrics"]


# ---- retrieval


def _lavis(images: np.ndarray, texts: np.ndarray, owner: list[int], k_test: int) -> dict[str, float]:
    """LAVIS's own way, written down plainly: top k_test kept, the rest -100, positions by argsort."""
    def scores(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        full = left @ right.T
        out = np.full_like(full, -100.0)
        for row, line in enumerate(full):
            best = np.argsort(line)[::-1][:k_test]
            out[row, best] = line[best]
        return out

    to_text = [min(int(np.where(np.argsort(-row, kind="stable") == j)[0][0]) for j, o in enumerate(owner) if o == i)
               for i, row in enumerate(scores(images, texts))]
    to_image = [int(np.where(np.argsort(-row, kind="stable") == owner[j])[0][0])
                for j, row in enumerate(scores(texts, images))]
    share = {f"{way}_r{k}": 100.0 * float(np.mean(np.array(ranks) < k))
             for way, ranks in (("txt", to_text), ("img", to_image)) for k in (1, 5, 10)}
    txt, img = (np.mean([share[f"{way}_r{k}"] for k in (1, 5, 10)]) for way in ("txt", "img"))
    return share | {"txt_r_mean": txt, "img_r_mean": img, "r_mean": (txt + img) / 2, "agg_metrics": txt}


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("k_test", [K_TEST, 20])
def test_retrieval_is_the_released_one(k_test: int) -> None:
    rng = np.random.default_rng(0)
    captions = [[f"picture {i} words {j}" for j in range(2 + i % 3)] for i in range(60)]
    table = Captions.of(captions)
    images = _unit(rng.normal(size=(60, 8)))
    texts = _unit(images[table.owner] + 0.5 * rng.normal(size=(len(table.texts), 8)))
    found = retrieval(images, texts, table, k_test)
    assert list(found["lavis"]) == METRICS
    assert found["lavis"] == pytest.approx(_lavis(images, texts, table.owner.tolist(), k_test))
    assert 10 < found["lavis"]["txt_r1"] < found["lavis"]["txt_r10"] < 100
    assert (found["n"], found["texts"], found["k_test"]) == (60, len(table.texts), k_test)
    assert found["img_r5"].n == len(table.texts) and found["img_r5"].low < found["img_r5"].value < found["img_r5"].high
    by_hand = np.mean([len(c) / len(table.texts) for c in captions])
    assert found["chance"]["txt_r1"] == pytest.approx(by_hand, abs=1e-5)
    assert found["chance"]["img_r1"] == pytest.approx(1 / 60, abs=1e-5)


def test_only_the_best_scores_are_kept() -> None:
    scores = score_matrix(np.array([[1.0, 0.0], [0.6, 0.8]]), np.array([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6]]), 2)
    np.testing.assert_allclose(scores, [[1.0, -100.0, 0.8], [-100.0, 0.8, 0.96]])


def test_shared_captions_and_ties() -> None:
    table = Captions.of([["a cat", "one"], ["a cat"], ["two"]])
    assert table.right_texts(slice(0, 3)).tolist() == [[1, 1, 1, 0], [1, 0, 1, 0], [0, 0, 0, 1]]
    assert table.right_pictures(slice(1, 4)).tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    same = np.ones((3, 4)) / 2
    assert retrieval(same, np.ones((4, 4)) / 2, table)["lavis"]["txt_r1"] == 0.0
    with pytest.raises(DataError, match="picture 1 has no caption"):
        Captions.of([["a"], []])
    with pytest.raises(DataError, match="3 pictures with 4 captions, but features of 3 and 2"):
        retrieval(same, np.ones((2, 4)), table)


# ---- a tiny tokenizer with its stage 1, and pictures on disk


@pytest.fixture(scope="module")
def tiny_config() -> Seed2Config:
    return Seed2Config(
        vit=EvaConfig(image_size=16, patch_size=8, width=16, depth=2, heads=2, mlp_width=24),
        qformer=QFormerConfig(width=24, depth=3, heads=2, mlp_width=32, max_positions=40, dropout=0.1),
        codebook_size=50, codebook_dim=6, decode_depth=1, image_features_dim=10)


@pytest.fixture(scope="module")
def stages(tiny_config: Seed2Config, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A tokenizer folder, the stage-1 checkpoint it came from, and a BERT tokenizer's folder."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("stages")
    first = Stage1Model(tiny_config, vocab_size=len(WORDS) + 1, embed_dim=8)
    torch.nn.init.normal_(first.query_tokens)
    tokenizer = Seed2Tokenizer(tiny_config).eval()
    own = tokenizer.state_dict()
    tokenizer.load_state_dict({n: v for n, v in first.state_dict().items() if n in own}, strict=False)
    features = tokenizer.pre_quant(torch.randn(5, 3, 16, 16)).detach()
    tokenizer.quantize.embedding.weight.data = features.flatten(0, 1)[:50]
    tokenizer.save_pretrained(folder / "tokenizer")
    frozen = {name for name, parameter in first.named_parameters() if not parameter.requires_grad}
    torch.save({"model": {n: v for n, v in first.state_dict().items() if n not in frozen}}, folder / "stage1.pth")
    (folder / "bert").mkdir()
    (folder / "bert" / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return folder / "tokenizer", folder / "stage1.pth", folder / "bert"


def _picture(colour: str, size: int = 24) -> bytes:
    canvas = Image.new("RGB", (size, size), "white")
    canvas.paste(COLOURS[colour], (4, 4, size - 4, size - 4))
    data = io.BytesIO()
    canvas.save(data, "PNG")
    return data.getvalue()


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """A json list of four pictures with two captions each, and one that is broken."""
    items = []
    for colour in COLOURS:
        (tmp_path / f"{colour}.png").write_bytes(_picture(colour))
        items.append({"image": f"{colour}.png", "caption": [f"A {colour} square.", f"a square of {colour}"]})
    (tmp_path / "broken.png").write_bytes(_picture("red")[:40])
    items.insert(2, {"image": "broken.png", "caption": "a square"})
    (tmp_path / "list.json").write_text(json.dumps(items))
    return tmp_path / "list.json"


def test_stage1_features_are_stage_1s_own(stages: tuple[Path, Path, Path], listed: Path) -> None:
    folder, file, bert = stages
    opened = open_tokenizer(folder, CPU, decoder="none", clip="none")
    stage1 = load_stage1(file, opened.tokenizer)
    assert stage1.visual_encoder is opened.tokenizer.visual_encoder
    spec = data_spec(str(listed), image_root=str(listed.parent))
    seen = run_pass(open_pairs(spec), [4, 0, 1], opened, stage1=stage1, batch=2)
    assert seen.rows == [4, 0, 1] and seen.keys == ["item 4", "item 0", "item 1"]
    pixels = torch.stack([seed_image_processor(16)(Image.open(listed.parent / f"{c}.png").convert("RGB"))
                          for c in ("grey", "red", "green")])
    words = find_words(13, bert, bert)
    out = stage1(pixels, *words(["a square"] * 3))
    np.testing.assert_allclose(seen.causal, out.query_feats[:, -1].detach().numpy(), atol=1e-5)
    tokenizer = opened.tokenizer
    assert seen.codes.tolist() == tokenizer.encode(pixels).tolist()
    up = tokenizer.upsample(tokenizer.quantize.lookup(torch.from_numpy(seen.codes)))
    rebuilt = F.normalize(stage1.vision_proj(tokenizer.rebuild_queries(up)[:, -1]), dim=-1)
    np.testing.assert_allclose(seen.rebuilt, rebuilt.detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(seen.decoded, tokenizer.decode(seen.codes.tolist()).numpy(), atol=1e-5)
    texts = stage1_texts(stage1, words).features(["A red square.", "a red square"])
    assert torch.allclose(texts[0], texts[1])  # captions are read as in training: lower case, no punctuation
    assert torch.allclose(texts[1:], stage1.text_features(*words(["a red square"])), atol=1e-6)


def test_stage1_checkpoints_that_do_not_fit(stages: tuple[Path, Path, Path], tiny_config: Seed2Config,
                                            tmp_path: Path) -> None:
    folder, file, bert = stages
    tokenizer = Seed2Tokenizer.from_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a stage-1 checkpoint: it holds no 'Qformer"):
        load_stage1(folder / "model.safetensors", tokenizer)
    trained_tower = Stage1Model(tiny_config, vocab_size=13, embed_dim=8, freeze_vit=False)
    torch.save(trained_tower.state_dict(), tmp_path / "own.pth")
    loaded = load_stage1(tmp_path / "own.pth", tokenizer)
    assert loaded.visual_encoder is not tokenizer.visual_encoder
    assert torch.equal(loaded.visual_encoder.cls_token, trained_tower.visual_encoder.cls_token)
    wide = dataclasses.replace(tiny_config, qformer=dataclasses.replace(tiny_config.qformer, width=36))
    torch.save(Stage1Model(wide, vocab_size=13, embed_dim=8).state_dict(), tmp_path / "wide.pth")
    with pytest.raises(CheckpointError, match=r"wide\.pth: .* another size, first 'query_tokens': the file has "
                                              r"\(1, 32, 36\), the model needs \(1, 32, 24\)"):
        load_stage1(tmp_path / "wide.pth", tokenizer)


def test_word_pieces_are_found_by_size(stages: tuple[Path, Path, Path], tmp_path: Path) -> None:
    bert = stages[2]
    ids, mask = find_words(13, bert, bert)(["a red square", "a " * 60])
    assert ids.shape == (2, 35) and ids[0, :5].tolist() == [2, 5, 6, 10, 3] and mask.sum(1).tolist() == [5, 35]
    number = MultimodalTokenizer.from_pretrained(NANO / "seed_tokenizer").vocabulary.n_text
    pieces = find_words(number + 1, None, NANO / "seed_tokenizer")
    ids, mask = pieces(["a cat", "a twemoji style drawing of a cat"])
    assert ids[0, 0] == 1 and ids[1, -1] == number and mask[0].tolist() == (ids[0] > 0).long().tolist()
    with pytest.raises(CheckpointError, match=rf"{number} word pieces.*table has 13 rows"):
        find_words(13, NANO / "seed_tokenizer", tmp_path)
    with pytest.raises(CheckpointError, match="no BERT tokenizer there"):
        find_words(13, tmp_path, tmp_path)
    with pytest.raises(CheckpointError, match="nobody/no-words: no BERT tokenizer there"):
        find_words(13, "nobody/no-words", tmp_path)
    with pytest.raises(CheckpointError, match=r"has 12 word pieces; the stage-1 checkpoint's word table has 30523 rows "
                                              r"\(.*\); name stage 1's by --text-tokenizer\."):
        find_words(30523, bert, tmp_path)


def test_clip_text_tower(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    from seed_multimodal.tokenizers.clip_weights import load_clip_vision

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    letters = sorted("abdequrs")
    vocab = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    model = CLIPModel(CLIPConfig(
        text_config={**sizes, "vocab_size": len(vocab), "bos_token_id": len(vocab) - 2, "eos_token_id": len(vocab) - 1,
                     "max_position_embeddings": 12},
        vision_config={**sizes, "image_size": 16, "patch_size": 8}, projection_dim=10)).eval()
    model.save_pretrained(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(vocab)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 12}))
    texts = clip_texts(tmp_path, CPU.device).features(["a red square", "a bad aqua", "a red square"])
    assert texts.shape == (3, 10) and torch.allclose(texts.norm(dim=1), torch.ones(3))
    assert torch.allclose(texts[0], texts[2]) and not torch.allclose(texts[0], texts[1], atol=1e-3)
    (tmp_path / "vocab.json").rename(tmp_path / "words.json")
    with pytest.raises(CheckpointError, match="holds no CLIP tokenizer"):
        clip_texts(tmp_path, CPU.device)
    (tmp_path / "words.json").rename(tmp_path / "vocab.json")
    load_clip_vision(tmp_path, log=None).save_pretrained(tmp_path / "vision")
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / "vision" / name).write_text((tmp_path / name).read_text())
    with pytest.raises(CheckpointError, match="describes a 'clip_vision_model', not a CLIP with a text tower"):
        clip_texts(tmp_path / "vision", CPU.device)
    with pytest.raises(CheckpointError, match="absent: there is no such folder"):
        clip_texts(tmp_path / "absent", CPU.device)


# ---- data


def test_data_specs(tmp_path: Path) -> None:
    assert data_spec("nano") == {"format": "nano", "split": "val"}
    assert data_spec("nano", "pairs") == {"format": "nano", "split": "pairs"}
    assert data_spec("a/{0..3}.tar", caption_key="top_caption", image_root=None) == {
        "format": "auto", "files": "a/{0..3}.tar", "caption_key": "top_caption"}
    file = tmp_path / "data.yaml"
    file.write_text("format: webdataset\npattern: x/*.tar\ncaption_file: txt\n")
    assert data_spec(str(file)) == {"format": "webdataset", "pattern": "x/*.tar", "caption_file": "txt"}
    with pytest.raises(DataError, match="somewhere: there is no such file or folder"):
        open_pairs(data_spec("somewhere"))
    rows = choose_rows(50, None, 1)
    assert sorted(rows) == list(range(50)) and rows != sorted(rows) and choose_rows(50, 5, 1) == rows[:5]


def test_bad_pictures_in_a_row_end_the_run(stages: tuple[Path, Path, Path], tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text(json.dumps([{"image": f"{i}.png", "caption": "a"} for i in range(30)]))
    source = open_pairs({"format": "json", "files": str(tmp_path / "list.json"), "image_root": str(tmp_path)})
    opened = open_tokenizer(stages[0], CPU, decoder="none", clip="none")
    with pytest.raises(DataError, match="20 samples in a row cannot be used"):
        run_pass(source, range(30), opened)
    with pytest.raises(DataError, match="none of the 3 samples could be used"):
        run_pass(source, range(3), opened)


def test_weights_that_are_no_numbers_end_the_run(stages: tuple[Path, Path, Path], listed: Path) -> None:
    source = open_pairs(data_spec(str(listed), image_root=str(listed.parent)))
    opened = open_tokenizer(stages[0], CPU, decoder="none", clip="none")
    opened.tokenizer.distill_image_proj.bias.data[3] = torch.nan
    with pytest.raises(DataError, match="item 1: its 'decoded' holds numbers that are not finite"):
        run_pass(source, [1, 0], opened)


@pytest.mark.process
def test_none_leaves_a_text_side_out(stages: tuple[Path, Path, Path], listed: Path, tmp_path: Path) -> None:
    settings = EvalSettings(data=data_spec(str(listed), image_root=str(listed.parent)), stage1="none",
                            clip_text="none", text_tokenizer="none", decoder="none", clip="none", device="cpu")
    report = evaluate_tokenizer(stages[0], tmp_path / "out", settings, lambda line: None)
    assert report["retrieval"] == {"causal_codes": None, "routes": {}} and report["n"] == 4


@pytest.mark.process
def test_json_list_with_a_broken_picture(stages: tuple[Path, Path, Path], listed: Path, tmp_path: Path) -> None:
    folder, file, bert = stages
    lines: list[str] = []
    settings = EvalSettings(data=data_spec(str(listed), image_root=str(listed.parent)), stage1=str(file),
                            text_tokenizer=str(bert), decoder="none", clip="none", device="cpu")
    report = evaluate_tokenizer(folder, tmp_path / "out", settings, lines.append, "the command")
    assert report["n"] == 4 and report["captions"] == 8 and len(report["left_out"]) == 1
    assert "broken.png" in report["left_out"][0] and any("left out" in line and "item 2" in line for line in lines)
    assert report["retrieval"]["causal_codes"] == "codes_by_blocks"
    assert list(report["retrieval"]["routes"]) == ["causal_embeddings", "codes_by_blocks"]
    assert report["reconstruction"] == {"clip": "", "rebuilt": 0} and report["codes"]["codebook"] == 50
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    text = (tmp_path / "out" / "report.md").read_text()
    assert "the command" in text and "Not measured: no CLIP" in text and "broken.png" in text
    assert Image.open(tmp_path / "out" / "reconstructions.jpg").width > 300
    evaluate_tokenizer(folder, tmp_path / "out", settings, lines.append)
    logged = [json.loads(line) for line in (tmp_path / "out" / "evaluate.txt").read_text().splitlines()]
    assert [line["features"] for line in logged] == ["causal_embeddings", "codes_by_blocks"] * 2
    assert all(set(METRICS) <= set(line) for line in logged) and logged[0] == logged[2]
    assert not [p for p in (tmp_path / "out").iterdir() if p.name.startswith(".")]


@pytest.mark.process
def test_shards_give_the_same_as_the_list(stages: tuple[Path, Path, Path], tmp_path: Path) -> None:
    folder, file, bert = stages
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for colour in COLOURS:
            for name, data in ((f"{colour}.png", _picture(colour)),
                               (f"{colour}.json", json.dumps({"caption": f"a {colour} square"}).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    settings = EvalSettings(data=data_spec(str(tmp_path / "*.tar")), stage1=str(file), text_tokenizer=str(bert),
                            decoder="none", clip="none", limit=3, device="cpu")
    report = evaluate_tokenizer(folder, tmp_path / "out", settings, lambda line: None)
    assert report["n"] == report["captions"] == 3 and report["codes"]["sequences"] == 3
    with pytest.raises(DataError, match="missing"):
        evaluate_tokenizer(folder, tmp_path / "out", dataclasses.replace(
            settings, data=data_spec(str(tmp_path / "missing" / "{0..1}.tar"))), lambda line: None)


# ---- the shipped tokenizer


@pytest.mark.process
@pytest.mark.slow
def test_shipped_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["eval", "tokenizer", "--model", str(NANO), "--data", "nano", "--out", str(tmp_path), "--limit", "60",
                 "--rebuild", "12", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out.splitlines()
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["data"] == {"format": "nano", "split": "val"} and report["n"] == 60
    assert report["retrieval"] == {"causal_codes": None, "routes": {}}  # nano has no text tower
    near = report["reconstruction"]["embedding"]
    assert near["n"] == 60 and near["cosine"]["value"] > near["cosine_to_others"]["value"] + 0.3
    part = report["reconstruction"]["picture_clip"]
    assert part["n"] == 12 and part["cosine"]["value"] > part["cosine_to_others"]["value"]
    assert report["codes"]["distinct"] >= 55
    assert printed[-1] == str(tmp_path / "report.md") and printed[0].startswith("embedding (n 60): cosine 0.")
    text = (tmp_path / "report.md").read_text()
    assert "a tokenizer alone has no text side" in text and not re.search(r"\bnan\b", text)


@pytest.mark.process
@pytest.mark.slow
def test_the_fast_encoder_sees_the_same(stages: tuple[Path, Path, Path], tmp_path: Path,
                                        capsys: pytest.CaptureFixture) -> None:
    folder, file, _ = stages
    source = open_pairs(data_spec("nano"))
    for model, stage1 in ((NANO, None), (folder, file)):
        seen = []
        for fast in (False, True):
            opened = open_tokenizer(model, CPU, decoder="none", clip="none", fast=fast)
            assert (opened.fast is not None) == fast
            first = load_stage1(stage1, opened.tokenizer) if stage1 is not None else None
            seen.append(run_pass(source, range(48), opened, stage1=first, batch=20))
        same = (seen[0].codes == seen[1].codes).mean()
        assert len(np.unique(seen[0].codes)) > 20
        if stage1 is None:
            assert same == 1.0
            np.testing.assert_allclose(seen[1].decoded, seen[0].decoded, atol=1e-5)
        else:  # an untrained codebook has rows that rounding tells apart
            assert same > 0.99
            np.testing.assert_allclose(seen[1].causal, seen[0].causal, atol=1e-4)
    run = ["eval", "tokenizer", "--model", str(NANO), "--data", "nano", "--decoder", "none", "--clip", "none",
           "--limit", "4", "--device", "cpu", "--json", "--out", str(tmp_path / "out")]
    used = []
    for flags in ([], ["--fast"], ["--no-fast"]):
        assert main([*run, *flags]) == 0
        used.append(json.loads(capsys.readouterr().out)["settings"]["fast"])
    assert used == [False, True, False]


def _folder(place: Path, form: str) -> str:
    """Five pictures with captions in one of the forms of `--data`, one of them broken and one without a caption."""
    place.mkdir()
    names = [*COLOURS, "cut", "untold"]
    data = {name: _picture(name if name in COLOURS else "red") for name in names}
    data["cut"] = data["cut"][:40]
    told = {name: f"a {name} square" for name in names if name != "untold"}
    if "parquet" in form:
        rows = [{"image": {"bytes": data[name], "path": name}, "text": told.get(name)} for name in names]
        parquet.write_table(pyarrow.Table.from_pylist(rows), place / "train.parquet", row_group_size=2)
        return str(place / "train.parquet" if "file" in form else place)
    for name in names:
        (place / f"{name}.png").write_bytes(data[name])
    if form == "txt":
        for name, text in told.items():
            (place / f"{name}.txt").write_text(text)
    elif form == "captions.json":
        items = [{"image": f"{name}.png", "caption": told.get(name)} for name in names]
        (place / form).write_text(json.dumps(items))
    else:
        items = [{"file_name" if "metadata" in form else "image": f"{name}.png",
                  "text" if "metadata" in form else "caption": [told[name]] if name in told else None}
                 for name in names]
        (place / form).write_text("".join(json.dumps(item) + "\n" for item in items))
    return str(place)


@pytest.mark.parametrize("form", ["txt", "captions.json", "captions.jsonl", "metadata.jsonl", "parquet in a folder",
                                  "parquet file"])
def test_a_folder_of_pictures_and_captions_is_evaluated(stages: tuple[Path, Path, Path], tmp_path: Path,
                                                        capsys: pytest.CaptureFixture, form: str) -> None:
    data = _folder(tmp_path / "own", form)
    assert main(["eval", "tokenizer", "--model", str(stages[0]), "--data", data, "--decoder", "none", "--clip", "none",
                 "--device", "cpu", "--stage1", str(stages[1]), "--text-tokenizer", str(stages[2]), "--json", "--out",
                 str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert (report["n"], report["captions"], len(report["left_out"])) == (len(COLOURS), len(COLOURS), 2)
    said = " ".join(report["left_out"])
    assert "not a picture" in said and re.search(r"has no (caption|\.txt)", said)
    assert printed.err.count("left out: ") == 2
    assert "causal_embeddings" in report["retrieval"]["routes"]


@pytest.mark.process
@pytest.mark.slow
def test_one_picture_has_no_others(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["eval", "tokenizer", "--model", str(NANO), "--data", "nano", "--rebuild", "0", "--limit", "1",
                 "--device", "cpu", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "embedding (n 1): cosine" in out and "no others to compare with" in out and "to others" not in out
    part = json.loads((tmp_path / "report.json").read_text())["reconstruction"]["embedding"]
    assert part["cosine_to_others"]["value"] is None and part["cosine_to_others"]["n"] == 0
    assert "| – |" in (tmp_path / "report.md").read_text()


def test_command_refuses_in_one_sentence(stages: tuple[Path, Path, Path], listed: Path, clip_folder: Path,
                                         tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = ["--out", str(tmp_path / "out"), "--device", "cpu"]
    data = ["--data", str(listed), "--image-root", str(listed.parent), "--decoder", "none", *out]
    tiny = ["--model", str(stages[0])]
    (tmp_path / "file").write_text("")
    for arguments, sentence in (
            (["--model", str(tmp_path / "absent"), *data], "there is no such folder"),
            (["--model", "nano-x", *data], "nano-x: is a seed_x; this measures SEED-2's kind of tokenizer"),
            ([*tiny, "--data", "elsewhere.txt", *out], "there is no such file or folder"),
            ([*tiny, "--stage1", str(tmp_path / "no.pth"), *data], "there is no such weights file"),
            ([*tiny, "--clip", str(tmp_path / "no"), *data], "download laion/CLIP"),
            ([*tiny, "--clip", str(NANO / "seed_tokenizer" / "diffusion_model" / "image_encoder"), *data],
             "gives image embeddings of width 256, this tokenizer decodes to width 10"),
            ([*tiny, "--clip-text", str(clip_folder), *data],
             "gives text features of width 8, this tokenizer decodes to width 10"),
            ([*tiny, *data, "--decoder", str(NANO / "seed_tokenizer" / "diffusion_model")],
             "'mean' has (1, 256), the tokenizer's image embeddings need (1, 10)"),
            ([*tiny, "--limit", "0", *data], "limit must be at least 1"),
            ([*tiny, "--seed", "-1", *data], "The seed must be at least 0, got -1"),
            ([*tiny, "--caption-key", "captoin", *data], "'captoin'"),
            ([*tiny, "--data", "nano", "--split", "vla", *out], "unknown split 'vla'"),
            ([*tiny, *data, "--out", str(tmp_path / "file" / "out")], "cannot be written")):
        assert main(["eval", "tokenizer", *arguments]) == 2
        captured = capsys.readouterr()
        errors = [line for line in captured.err.splitlines() if line.startswith("seed: ")]
        assert not captured.out and len(errors) == 1 and sentence in errors[0], errors
