"""Label heads: what is named right, how far two embeddings are apart by what is read from them, their file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from seed_multimodal.errors import CheckpointError
from seed_multimodal.vision.label_heads import LabelHeads
from seed_multimodal.weights import save_state_dict


def test_named_right_counts_no_label_that_is_left_out() -> None:
    heads = LabelHeads(4, {"style": 3, "layout": 5})
    embedding = torch.randn(8, 4)
    labels = torch.stack([logits.argmax(1) for logits in heads(embedding).values()], 1)
    assert bool(heads.right(embedding, labels).all())
    labels[2, 1] = -100
    assert (~heads.right(embedding, labels)).nonzero().tolist() == [[2, 1]]
    assert float(heads.loss(embedding, labels).detach()) > 0


def test_divergence_is_that_of_torch_s_distributions_and_teaches_the_embedding_only() -> None:
    heads = LabelHeads(4, {"style": 3, "layout": 5}).requires_grad_(False)
    found, teacher = torch.randn(8, 4, requires_grad=True), torch.randn(8, 4, requires_grad=True)
    wanted = torch.stack([kl_divergence(Categorical(logits=heads(teacher)[name]),
                                        Categorical(logits=heads(found)[name])) for name in heads.classes])
    with torch.autocast("cpu", torch.bfloat16):
        divergence = heads.divergence(found, teacher)
    torch.testing.assert_close(divergence, wanted.mean(0), rtol=1e-5, atol=1e-6)
    divergence.mean().backward()
    assert float(found.grad.abs().sum()) > 0 and teacher.grad is None
    assert float(heads.divergence(teacher, teacher).detach().abs().max()) == pytest.approx(0, abs=1e-6)


def test_a_file_shows_labels_and_sizes_or_is_refused(tmp_path: Path) -> None:
    heads = LabelHeads(4, {"style": 3, "layout": 5})
    save_state_dict(heads.state_dict(), tmp_path / "heads.safetensors")
    loaded = LabelHeads.load(tmp_path / "heads.safetensors")
    assert (loaded.width, loaded.classes) == (4, {"layout": 5, "style": 3}) and not loaded.training
    assert list(LabelHeads.load(tmp_path / "heads.safetensors", ("style", "layout")).classes) == ["style", "layout"]
    with pytest.raises(CheckpointError, match="its heads name layout, style, not style, count"):
        LabelHeads.load(tmp_path / "heads.safetensors", ("style", "count"))
    embedding = torch.randn(2, 4)
    assert torch.equal(loaded(embedding)["style"], heads(embedding)["style"])
    save_state_dict({"readout": torch.zeros(3, 4)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="other.safetensors: holds no label heads"):
        LabelHeads.load(tmp_path / "other.safetensors")
