"""Retrieval as in LAVIS: shared captions, ties; text encoders for the tokenizer's
evaluation."""

import numpy as np
import pytest
import torch
from repository import NANO

from seed_multimodal.errors import CheckpointError, DataError
from seed_multimodal.evaluation.clip import clip_texts
from seed_multimodal.evaluation.retrieval import retrieval


def lavis_ranks(scores: np.ndarray) -> np.ndarray:
    """LAVIS's computation: scores below the top 20 become -100, ranks by argsort."""
    best = np.argsort(-scores)[:, :20]
    kept = np.full_like(scores, -100.0)
    np.put_along_axis(kept, best, np.take_along_axis(scores, best, 1), 1)
    return np.argsort(np.argsort(-kept, kind="stable"), kind="stable")


def unit(rows: np.ndarray) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.from_numpy(rows), dim=-1)


def encoder(captions: list[list[str]], features: torch.Tensor):
    """Texts → their features."""
    by_text = dict(zip([text for row in captions for text in row], features, strict=True))
    return lambda texts: torch.stack([by_text[text] for text in texts])


def test_retrieval_equals_lavis():
    # Published recalls are LAVIS's.
    rng = np.random.default_rng(0)
    captions = [[f"image {i} words {j}" for j in range(2 + i % 3)] for i in range(60)]
    owner = np.array([i for i, row in enumerate(captions) for _ in row])
    images = unit(rng.normal(size=(60, 8)))
    texts = unit(images[owner].numpy() + 0.5 * rng.normal(size=(len(owner), 8)))
    scores = retrieval(images, encoder(captions, texts), captions)

    cosines = (images @ texts.T).numpy()
    to_text = lavis_ranks(cosines)
    best_text = np.array([to_text[image, owner == image].min() for image in range(60)])
    image_rank = lavis_ranks(cosines.T)[np.arange(len(owner)), owner]
    for name, order in (("txt", best_text), ("img", image_rank)):
        recalls = [100 * (order < level).mean() for level in (1, 5, 10)]
        assert [scores["lavis"][f"{name}_r{level}"] for level in (1, 5, 10)] == pytest.approx(
            recalls
        )
        assert scores["lavis"][f"{name}_r_mean"] == pytest.approx(np.mean(recalls))
    assert scores["lavis"]["agg_metrics"] == scores["lavis"]["txt_r_mean"]
    assert 10 < scores["lavis"]["txt_r1"] < scores["lavis"]["txt_r10"] < 100
    assert (scores["n"], scores["texts"], scores["img_r5"].n) == (60, len(owner), len(owner))
    assert scores["img_r5"].low < scores["img_r5"].value < scores["img_r5"].high


def test_retrieval_of_a_caption_of_several_images():
    captions = [["a cat", "one"], ["a cat"], ["two"]]
    texts = unit(np.array([[1.0, 1, 0], [1, 0, 0], [1, 1, 0], [0, 0, 1]])).float()
    scores = retrieval(torch.eye(3), encoder(captions, texts), captions)
    # It is right for each of them.
    assert (scores["texts"], scores["txt_r1"].value, scores["img_r1"].value) == (4, 1.0, 1.0)
    # Ties are wrong: a model whose features are all equal finds nothing.
    same = retrieval(torch.ones(3, 4) / 2, encoder(captions, torch.ones(4, 4) / 2), captions)
    assert same["txt_r1"].value == same["img_r1"].value == 0.0


def test_retrieval_refuses_embeddings_that_are_not_finite():
    # No text scores as high as NaN, so that recall would be perfect.
    captions = [["a"], ["b"]]
    features = torch.eye(2)
    for images, texts in ((features, features * float("nan")), (features * float("inf"), features)):
        with pytest.raises(DataError, match="not finite"):
            retrieval(images, encoder(captions, texts), captions)


def test_stage1_texts_reads_captions_as_in_training(stages):
    from seed_multimodal import Seed2Tokenizer
    from seed_multimodal.recipes.seed.evaluate_tokenizer import load_stage1, stage1_texts

    tokenizer = Seed2Tokenizer.from_pretrained(stages.tokenizer)
    model = load_stage1(stages.stage1, tokenizer)
    assert model.visual_encoder is tokenizer.visual_encoder
    texts = stage1_texts(model, stages.vocabulary)(["A red square.", "a red square", "grey"])
    assert torch.allclose(texts[0], texts[1])
    assert not torch.allclose(texts[0], texts[2], atol=1e-3)
    assert torch.allclose(texts.norm(dim=1), torch.ones(3))
    # Another vocabulary would give every caption a wrong embedding.
    with pytest.raises(CheckpointError, match="seed_tokenizer"):
        stage1_texts(model, NANO / "seed_tokenizer")
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*Qformer"):
        load_stage1(stages.tokenizer / "model.safetensors", tokenizer)


def test_clip_texts_without_a_tokenizer(clip_folder, tmp_path):
    # CLIP folders of vision encoders alone have no texts: the folder is named.
    for file in clip_folder.iterdir():
        if file.name != "vocab.json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match=tmp_path.name):
        clip_texts(tmp_path, torch.device("cpu"))
