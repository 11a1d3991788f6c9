"""Retrieval as in LAVIS: shared captions, ties, blocks; text encoders for the tokenizer's
evaluation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from repository import NANO

from seed_multimodal.errors import CheckpointError
from seed_multimodal.evaluation import retrieval as module
from seed_multimodal.evaluation.retrieval import clip_texts, ranks, retrieval
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.models.seed.evaluate_tokenizer import load_stage1, stage1_texts
from seed_multimodal.models.seed.losses import Stage1Model
from seed_multimodal.models.seed.modeling import Seed2Tokenizer


def lavis(images: np.ndarray, texts: np.ndarray, owner: list[int], k_test: int) -> dict[str, float]:
    """LAVIS's computation: scores below the top k_test become -100, ranks by argsort."""

    def scores(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        full = left @ right.T
        out = np.full_like(full, -100.0)
        for row, line in enumerate(full):
            best = np.argsort(line)[::-1][:k_test]
            out[row, best] = line[best]
        return out

    to_text = [
        min(
            int(np.where(np.argsort(-row, kind="stable") == j)[0][0])
            for j, o in enumerate(owner)
            if o == i
        )
        for i, row in enumerate(scores(images, texts))
    ]
    to_image = [
        int(np.where(np.argsort(-row, kind="stable") == owner[j])[0][0])
        for j, row in enumerate(scores(texts, images))
    ]
    share = {
        f"{way}_r{k}": 100.0 * float(np.mean(np.array(positions) < k))
        for way, positions in (("txt", to_text), ("img", to_image))
        for k in (1, 5, 10)
    }
    txt, img = (np.mean([share[f"{way}_r{k}"] for k in (1, 5, 10)]) for way in ("txt", "img"))
    return share | {
        "txt_r_mean": txt,
        "img_r_mean": img,
        "r_mean": (txt + img) / 2,
        "agg_metrics": txt,
    }


def unit(rows: np.ndarray) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.from_numpy(rows), dim=-1)


def encoder(captions: list[list[str]], features: torch.Tensor):
    """Texts → their features."""
    by_text = dict(zip([text for row in captions for text in row], features, strict=True))
    return lambda texts: torch.stack([by_text[text] for text in texts])


@pytest.mark.parametrize(("k_test", "block"), [(128, 1 << 26), (20, 1000)])
def test_retrieval_equals_lavis(k_test, block, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", block)
    rng = np.random.default_rng(0)
    captions = [[f"image {i} words {j}" for j in range(2 + i % 3)] for i in range(60)]
    owner = [i for i, row in enumerate(captions) for _ in row]
    images = unit(rng.normal(size=(60, 8)))
    texts = unit(images[owner].numpy() + 0.5 * rng.normal(size=(len(owner), 8)))
    scores = retrieval(images, encoder(captions, texts), captions)
    assert scores["lavis"] == pytest.approx(lavis(images.numpy(), texts.numpy(), owner, k_test))
    assert 10 < scores["lavis"]["txt_r1"] < scores["lavis"]["txt_r10"] < 100
    assert (scores["n"], scores["texts"], scores["img_r5"].n) == (60, len(owner), len(owner))
    assert scores["img_r5"].low < scores["img_r5"].value < scores["img_r5"].high


def test_ranks_by_hand():
    scores = torch.tensor([[0.9, 0.1, 0.5, 0.2], [0.3, 0.2, 0.8, 0.1], [0.4, 0.6, 0.7, 0.5]])
    pairs = np.array([[0, 0], [1, 1], [2, 3]])
    assert ranks(scores, torch.eye(4), pairs).tolist() == [
        0,
        2,
        2,
    ]  # b is beaten by a and c; d by b and c
    assert ranks(scores, torch.eye(4), pairs, np.array([1, 1, 5, 1])).tolist() == [0, 6, 6]
    assert ranks(scores, torch.eye(4), np.array([[0, 0], [1, 1], [1, 2], [2, 3]])).tolist() == [
        0,
        0,
        2,
    ]  # the best
    assert (
        ranks(torch.ones(5, 5), torch.ones(5, 5), np.arange(5)[:, None].repeat(2, 1)).tolist()
        == [4] * 5
    )  # ties


def test_retrieval_of_a_caption_of_several_images():
    captions = [["a cat", "one"], ["a cat"], ["two"]]
    texts = unit(
        np.array([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    ).float()
    scores = retrieval(torch.eye(3), encoder(captions, texts), captions)
    assert (scores["texts"], scores["txt_r1"].value, scores["img_r1"].value) == (4, 1.0, 1.0)
    same = retrieval(torch.ones(3, 4) / 2, encoder(captions, torch.ones(4, 4) / 2), captions)
    assert same["txt_r1"].value == same["img_r1"].value == 0.0  # ties count as wrong


def test_stage1_texts_reads_captions_as_in_training(stages):
    tokenizer = Seed2Tokenizer.from_pretrained(stages.tokenizer)
    model = load_stage1(stages.stage1, tokenizer)
    assert model.visual_encoder is tokenizer.visual_encoder
    texts = stage1_texts(model, stages.vocabulary)(["A red square.", "a red square"])
    assert torch.allclose(texts[0], texts[1]) and torch.allclose(texts.norm(dim=1), torch.ones(2))
    n_text = MultimodalTokenizer.from_pretrained(NANO / "seed_tokenizer").vocabulary.n_text
    with pytest.raises(
        CheckpointError, match=rf"{n_text} word pieces.*table has 13 rows.*--text-tokenizer"
    ):
        stage1_texts(model, NANO / "seed_tokenizer")
    with pytest.raises(CheckpointError, match="nobody/no-words: no BERT tokenizer there"):
        stage1_texts(model, "nobody/no-words")


def test_load_stage1_of_other_checkpoints(stages, tmp_path):
    tokenizer = Seed2Tokenizer.from_pretrained(stages.tokenizer)
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: not a stage-1 checkpoint: it holds no 'Qformer"
    ):
        load_stage1(stages.tokenizer / "model.safetensors", tokenizer)
    trained = Stage1Model(tokenizer.config, vocab_size=13, embed_dim=8, freeze_vit=False)
    torch.save(trained.state_dict(), tmp_path / "own.pth")
    loaded = load_stage1(tmp_path / "own.pth", tokenizer)  # with its own vision encoder
    assert torch.equal(loaded.visual_encoder.cls_token, trained.visual_encoder.cls_token)
    assert loaded.visual_encoder is not tokenizer.visual_encoder


def test_clip_texts_needs_a_text_encoder_and_its_tokenizer(clip_folder, tmp_path):
    texts = clip_texts(clip_folder, torch.device("cpu"))(["a red square", "a bad", "a red square"])
    assert torch.allclose(texts.norm(dim=1), torch.ones(3)) and torch.allclose(texts[0], texts[2])
    assert not torch.allclose(texts[0], texts[1], atol=1e-3)
    with pytest.raises(CheckpointError, match="absent: no such folder"):
        clip_texts(tmp_path / "absent", torch.device("cpu"))
    for file in clip_folder.iterdir():
        if file.name != "vocab.json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match="holds no CLIP tokenizer"):
        clip_texts(tmp_path, torch.device("cpu"))
