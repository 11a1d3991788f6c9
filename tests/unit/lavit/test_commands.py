"""`seed` commands with a LaVIT folder, and its notebooks (the programs:
`tests/contract/test_programs.py`; its evaluation: `tests/unit/evaluation/test_programs.py`)."""

import json
import re
import runpy
import sys

import pytest
from random_images import noise
from repository import ROOT
from tiny import read_json

HOME = ROOT / "src" / "lavit"
pytestmark = pytest.mark.filterwarnings("ignore:Answers are not lemmatised")


# ---- seed


@pytest.fixture
def seed(run_seed, tiny_lavit_folder):
    """Runs a `seed` command and returns its records."""

    def run(*argv: str) -> list[dict]:
        code, lines, _ = run_seed(tiny_lavit_folder, *argv, "--json")
        assert code == 0
        return [json.loads(line) for line in lines]

    return run


@pytest.mark.slow
def test_tokenize_and_reconstruct_select_patches_by_seed(seed, image, tmp_path, tiny_lavit):
    codes = {}
    for value in (1, 2):
        options = ("--seed", str(value))
        [tokenized] = seed("tokenize", image, *options)
        [rebuilt] = seed("reconstruct", image, "--steps", "1", *options)
        codes[value] = tiny_lavit.tokenize(image, seed=value)[0].tolist()
        assert tokenized["codes"] == rebuilt["codes"] == codes[value]
    assert codes[1] != codes[2]

    # Images have different numbers of codes, also in a file.
    noise(2).save(tmp_path / "other.png")
    file = str(tmp_path / "codes.jsonl")
    first, second = seed("tokenize", image, str(tmp_path / "other.png"), "--out", file)
    assert len(first["codes"]) != len(second["codes"])
    rebuilt = seed("reconstruct", "--codes-file", file, "--steps", "1")
    assert [record["codes"] for record in rebuilt] == [first["codes"], second["codes"]]


# ---- notebooks


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["understanding", "text2image_synthesis", "multimodal_synthesis", "image_detokenize"]
)
def test_notebooks(name, tiny_lavit_folder, monkeypatch, tmp_path):
    # All code cells run; none has outputs.
    notebook = read_json(HOME / f"{name}.ipynb")
    monkeypatch.setenv("LAVIT_MODEL", str(tiny_lavit_folder))
    monkeypatch.chdir(HOME)
    monkeypatch.syspath_prepend(str(HOME))
    monkeypatch.delitem(sys.modules, "models", raising=False)
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    code = "\n".join("".join(cell["source"]) for cell in cells)
    file = tmp_path / f"{name}.py"
    file.write_text(re.sub(r"num_inference_steps=\d+", "num_inference_steps=1", code))
    variables = runpy.run_path(str(file))
    monkeypatch.delitem(sys.modules, "models")
    assert any(variables.get(key) for key in ("captions", "pictures", "prompts", "rebuilt"))


# ---- seeds of the selection


@pytest.mark.slow
def test_texts_encode_with_the_seed_of_their_settings(tiny_lavit):
    # `seed=None` draws from torch's generator, as the original, in each form of the request.
    import torch

    image = noise(1)
    expected = [tiny_lavit.describe(image, seed=seed) for seed in range(4)]
    assert len(set(expected)) > 1
    assert tiny_lavit.describe(image) == expected[0]
    for seed in range(4):
        torch.manual_seed(seed)
        unseeded = tiny_lavit.describe(image, seed=None)
        torch.manual_seed(seed)
        message = [{"role": "user", "content": [image]}]
        assert tiny_lavit.chat(message, seed=None).text == unseeded
