"""What the tests of evaluation share: the samples of a small report, who knows them, and a judge that was trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from known_world import KnowingJudge, Oracle, few_things

from seed_multimodal.training.loop import train
from seed_multimodal.training.loop_settings import StageSettings
from seed_nano.report import train_judge
from seed_nano.report.judge import Judge, JudgeConfig
from seed_nano.report.samples import Samples, Sizes, make_samples

SIZES = Sizes.limited(12)


@pytest.fixture(scope="session")
def val() -> Samples:
    return make_samples("val", SIZES)


@pytest.fixture(scope="session")
def knowing() -> KnowingJudge:
    return KnowingJudge()


@pytest.fixture(scope="session")
def oracle(knowing: KnowingJudge, val: Samples) -> Oracle:
    return Oracle(knowing, val)


@pytest.fixture(scope="session")
def run_judge():
    """Train a small judge on that world: (folder, steps, stop_after=None)."""
    def run(folder: Path, steps: int, stop_after: int | None = None, seed: int = 5) -> Judge:
        settings = StageSettings(steps=steps, batch_size=24, lr=3e-3, warmup=5, seed=seed, curves=False)
        config = JudgeConfig(widths=(16, 24, 32), blocks=(0, 1, 1))
        task = train_judge.JudgeTask(settings, folder / "judge", torch.device("cpu"), config, few_things, probes=4)
        if stop_after is not None:  # as data that ends: the checkpoint of that step is what is left
            task.begin_step = lambda step: step < stop_after
        train(task, task.settings, folder)
        return task.judge.eval()

    return run


@pytest.fixture(scope="session")
def trained(run_judge, tmp_path_factory) -> Judge:
    """A judge that really learned its small world."""
    return run_judge(tmp_path_factory.mktemp("judge"), 100)


def clip_words(folder: Path) -> Path:
    """CLIP's kind of tokenizer with letters alone."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [letter + end for letter in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
    vocabulary = {piece: number for number, piece in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP with transformers' layout that reads letters."""
    from transformers import CLIPConfig, CLIPModel

    folder = clip_words(tmp_path_factory.mktemp("clip"))
    torch.manual_seed(0)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    size = len(json.loads((folder / "vocab.json").read_text()))
    CLIPModel(CLIPConfig(
        projection_dim=8, vision_config={**tower, "image_size": 16, "patch_size": 8},
        text_config={**tower, "vocab_size": size, "max_position_embeddings": 8, "bos_token_id": size - 2,
                     "eos_token_id": size - 1})).save_pretrained(folder)
    return folder
