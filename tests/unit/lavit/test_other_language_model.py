"""LaVIT on a Qwen 3 with a hub tokenizer: used, trained, and the trained model used."""

from __future__ import annotations

from pathlib import Path

import pretrain_parts
import pytest
from PIL import Image
from tiny.lavit import build_lavit

from seed_multimodal.models.lavit.pipeline import Lavit
from seed_multimodal.models.lavit.processing import HubLavitTokenizer, load_lavit_tokenizer
from seed_multimodal.models.lavit.train_llm import PretrainTask

IMAGE = Image.new("RGB", (40, 40), "red")
pytestmark = pytest.mark.filterwarnings("ignore:Answers are not lemmatised")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return build_lavit(tmp_path_factory.mktemp("lavit") / "system", hub=True)


def test_tokenizer_has_the_tokens_of_lavit(folder: Path):
    tokenizer = load_lavit_tokenizer(folder / "llm")
    assert isinstance(tokenizer, HubLavitTokenizer)
    vocabulary = tokenizer.vocabulary
    n_text = vocabulary.n_text
    assert (vocabulary.boi_id, vocabulary.eoi_id, vocabulary.code_start) == (
        n_text,
        n_text + 1,
        n_text + 2,
    )
    ids = [*tokenizer.text_ids("a red apple"), *vocabulary.image_ids([3, 1])]
    assert tokenizer.decode(ids) == "a red apple"
    # Special tokens may have any ids, so none are skipped inside images.
    assert not any(vocabulary.is_ignored_in_image(id) for id in range(n_text))


def test_answers_and_drawings(folder: Path):
    system = Lavit.from_pretrained(folder, device="cpu", log=None)
    assert system.describe([IMAGE, IMAGE]) == [system.describe(IMAGE)] * 2
    system.ask(IMAGE, "What is it?")
    assert isinstance(system.draw("a house", seed=1), Image.Image)
    assert isinstance(system.compose([IMAGE, "in the snow"], seed=1), Image.Image)


def test_training_and_its_checkpoint(folder: Path, tmp_path):
    pretrain_parts.write_parts(tmp_path)
    data = pretrain_parts.data_of(tmp_path)
    config = pretrain_parts.config_of(
        tmp_path,
        tmp_path / "out",
        data=data,
        model={"path": str(folder / "llm"), "dtype": "fp32", "lora": {"r": 4}},
        tokenizer={"pretrained_model_name_or_path": str(folder / "llm")},
        visual_encoder={"path": str(folder / "tokenizer")},
        trainer={"max_steps": 3},
    )
    PretrainTask.train(config)
    assert len(pretrain_parts.losses(tmp_path / "out")) == 3

    checkpoint = tmp_path / "out" / "checkpoint-3"
    before = Lavit.from_pretrained(folder, device="cpu", log=None, load_decoder=False)
    trained = Lavit.from_pretrained(checkpoint, device="cpu", log=None, load_decoder=False)
    assert isinstance(trained.tokenizer, HubLavitTokenizer)
    assert trained.describe(IMAGE) != before.describe(IMAGE)
