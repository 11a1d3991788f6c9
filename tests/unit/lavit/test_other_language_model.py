"""LaVIT on a Qwen 3 with a hub tokenizer: used, trained, and the trained model used."""

from __future__ import annotations

from pathlib import Path

import pytest
from random_images import noise
from tiny.lavit import build_lavit

from seed_multimodal.models.lavit.pipeline import Lavit
from seed_multimodal.models.lavit.processing import HubLavitTokenizer

IMAGE = noise(1)
pytestmark = pytest.mark.filterwarnings("ignore:Answers are not lemmatised")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return build_lavit(tmp_path_factory.mktemp("lavit") / "system", hub=True)


def test_tokens_and_answers(folder):
    # A hub tokenizer has its own special tokens, which stay text.
    system = Lavit.from_pretrained(folder, device="cpu", log=None)
    tokenizer = system.tokenizer
    assert isinstance(tokenizer, HubLavitTokenizer)
    vocabulary = tokenizer.vocabulary
    first = vocabulary.n_text
    assert (vocabulary.boi_id, vocabulary.eoi_id, vocabulary.code_start) == (
        first,
        first + 1,
        first + 2,
    )
    ids = [*tokenizer.text_ids("a red apple"), *vocabulary.image_ids([3, 1])]
    assert tokenizer.decode(ids) == "a red apple"
    # Special tokens may have any ids, so none are skipped inside images.
    assert not any(vocabulary.is_ignored_in_image(id) for id in range(first))
    assert system.describe([IMAGE, IMAGE]) == [system.describe(IMAGE)] * 2
    assert system.compose([IMAGE, "in the snow"], seed=1).size


@pytest.mark.slow
def test_training_and_its_checkpoint(folder, tmp_path):
    # Three steps; the checkpoint opens as a system.
    import pretrain_parts

    from seed_multimodal.models.lavit.train_llm import PretrainTask

    pretrain_parts.write_parts(tmp_path)
    out = tmp_path / "out"
    config = pretrain_parts.config_of(
        tmp_path,
        out,
        data=pretrain_parts.data_of(tmp_path),
        model={"path": str(folder / "llm"), "dtype": "fp32", "lora": {"r": 4}},
        tokenizer={"pretrained_model_name_or_path": str(folder / "llm")},
        visual_encoder={"path": str(folder / "tokenizer")},
        trainer={"max_steps": 3},
    )
    PretrainTask.train(config)
    options = {"device": "cpu", "log": None, "load_decoder": False}
    before = Lavit.from_pretrained(folder, **options)
    trained = Lavit.from_pretrained(out / "checkpoint-3", **options)
    assert isinstance(trained.tokenizer, HubLavitTokenizer)
    assert trained.describe(IMAGE) != before.describe(IMAGE)
