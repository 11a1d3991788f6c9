"""A tiny LLaMA and tiny shards, for tests of the training application."""

import copy
import json
import os
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import yaml
from data_files import lines
from repository import APPLICATION, NANO, ROOT
from warm_processes import PYTHON
from yaml_tables import read_tables

TOKENIZER = NANO / "seed_tokenizer"
CODES = 1024
PER_IMAGE = 32
GROUPS = read_tables(__file__)
SIZES = GROUPS["sizes"]
LORA = GROUPS["lora"]
TRAINER = GROUPS["trainer"]
OPTIM = GROUPS["optim"]
WORDS = "a red fox sits on the green hill under one small yellow moon while two birds sing".split()
COLOURS = {name: tuple(colour) for name, colour in GROUPS["colours"].items()}


def write_llama(folder, vocab_size):
    """A random LLaMA with the special ids of the originals."""
    from tiny.language import random_llm

    random_llm("llama", vocab_size, initializer_range=0.02, **SIZES).save_pretrained(folder)


def write_base(folder) -> Path:
    """A random LLaMA for the tokenizer of `write_files`."""
    from seed_multimodal import MultimodalTokenizer

    write_llama(folder, MultimodalTokenizer.from_pretrained(TOKENIZER).vocabulary.size)
    return folder


def merged(groups: dict, changes) -> dict:
    """A configuration with changes; mappings are merged into the groups."""
    return {
        **groups,
        **{
            name: {**groups.get(name, {}), **value} if isinstance(value, dict) else value
            for name, value in changes.items()
        },
    }


def write_data(folder, n_codes, per_image: int, records: int = 60) -> dict:
    """Captions and conversations as jsonl; returns a data configuration over both."""
    # The same records at every call.
    rng = random.Random(0)
    captions = []
    chats = []
    for index in range(records):
        codes = [rng.randrange(n_codes) for _ in range(per_image)]
        text = " ".join(rng.choices(WORDS, k=rng.randint(2, 12)))
        captions.append({"image_ids": codes, "text": text})
        chats.append(
            {
                "messages": [
                    {"role": "user", "content": [{"codes": codes}, "what is it?"]},
                    {"role": "assistant", "content": [f"{text}, number {index}"]},
                ]
            }
        )
    lines(folder / "captions.jsonl", captions)
    lines(folder / "chats.jsonl", chats)
    return data_in(folder, GROUPS["data"])


def data_in(folder, data) -> dict:
    """A data configuration, of which files and images are in a folder."""
    data = copy.deepcopy(data)
    for source in data["sources"]:
        for key in source.keys() & {"files", "image_dir"}:
            source[key] = str(folder / source[key])
    return data


def compose(
    arguments: Sequence[str], configs: Path = APPLICATION / "configs", name="train"
) -> dict:
    """The configuration of a command line, as the programs compose it."""
    import hydra

    from seed_multimodal.compat.training_flags import translate
    from seed_multimodal.training.cli import configuration_errors, hydra_arguments, plain_config

    file = configs / f"{name}.yaml"
    with configuration_errors(), hydra.initialize_config_dir(str(configs), version_base="1.3"):
        _, overrides, _ = hydra_arguments(translate(arguments), file)
        return plain_config(hydra.compose(name, overrides), file)


def task_of(task_class, config):
    """A training's task in this process."""
    import torch

    from seed_multimodal.training.distributed import ProcessGroup

    return task_class(task_class.run_type.read(config), ProcessGroup(), torch.device("cpu"))


def fixtures_of(parts) -> tuple:
    """Fixtures of a module of tiny parts: `parts_dir`, a folder for the session, and
    `config_of(output, **changes)`, a whole configuration on it."""

    @pytest.fixture(scope="session")
    def parts_dir(tmp_path_factory) -> Path:
        folder = tmp_path_factory.mktemp("parts")
        parts.write_parts(folder)
        return folder

    @pytest.fixture(scope="session")
    def config_of(parts_dir) -> Callable[..., dict]:
        return partial(parts.config_of, parts_dir)

    return parts_dir, config_of


def write_files(folder, **changes) -> dict[str, Path]:
    """YAML files of all groups in `folder`; `changes` (model, data, trainer, optim) are merged into
    them."""
    from seed_multimodal import MultimodalTokenizer

    vocabulary = MultimodalTokenizer.from_pretrained(TOKENIZER).vocabulary
    contents = {
        "model": {"sizes": SIZES, "dtype": "fp32"},
        "data": write_data(folder / "data", vocabulary.n_codes, vocabulary.tokens_per_image),
        "trainer": TRAINER,
        "optim": OPTIM,
        "tokenizer": {"pretrained_model_name_or_path": str(TOKENIZER)},
    }
    # One file a group.
    files = {}
    for group, content in contents.items():
        files[group] = folder / f"{group}.yaml"
        files[group].write_text(yaml.safe_dump({**content, **changes.get(group, {})}))
    return files


def overrides(files: dict[str, Path], output, *more: str) -> list[str]:
    """Arguments of `train.py` that use the files."""
    return [*(f"{group}={file}" for group, file in files.items()), f"output_dir={output}", *more]


def environment(**values: str) -> dict[str, str]:
    """The environment with one thread and without the hub; scripts find a warm Python by
    `VIRTUAL_ENV`."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT / "src"),
        "VIRTUAL_ENV": str(Path(PYTHON).parents[1]),
        **values,
    }


def log_lines(output, name="train.log.jsonl") -> list[dict[str, float]]:
    """The JSON log without an unfinished last line."""
    file = output / name
    # A run that was killed may leave half a line.
    lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def losses(output, name="train.log.jsonl", loss: str = "loss") -> dict[int, float]:
    """Step → loss, in full precision."""
    return {int(line["step"]): line[loss] for line in log_lines(output, name) if loss in line}
