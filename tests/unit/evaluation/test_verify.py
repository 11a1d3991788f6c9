"""`seed verify`: the table of the shipped models, and what counts as equal."""

import base64

import pytest
from tiny import read_json, write_json
from yaml_tables import read_tables

from seed_multimodal.cli.main import main
from seed_multimodal.evaluation.verify import REFERENCE, compare


def drawing(value: int) -> dict:
    """A grey drawing."""
    thumbnail = base64.b64encode(bytes([value]) * 768).decode()
    return {"sha256": str(value), "size": [64, 64], "thumbnail": thumbnail}


def features(first: float) -> dict:
    return {"features": [first, 1.0 + first], "std": 2.0, "shape": [2, 1]}


MADE = {
    "text": lambda text: {"text": text},
    "codes": lambda n_others: {"codes": [0] * (32 - n_others) + [1] * n_others},
    "drawing": drawing,
    "features": features,
}


@pytest.mark.parametrize("case", read_tables(__file__), ids=str)
def test_compare(case):
    # `seed verify` on another processor: what is close, and what is another model.
    value, reference = map(MADE[case["kind"]], (case["value"], case["reference"]))
    assert compare(value, reference).startswith(case["verdict"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nano", "nano-x", "nano-lavit"])
def test_verify_of_a_shipped_model(name, tmp_path, capsys):
    """After a training: `seed verify NAME --out DIR`, and copy its verify.json to the model."""
    out = tmp_path / "out"
    assert main(["verify", name, "--device", "cpu", "--out", str(out)]) == 0
    table = capsys.readouterr().out
    assert (out / "verify.md").read_text() == table
    n_rows = table.count("\n| ") - 1
    assert n_rows == table.count("| equal |") + table.count("| close: ")
    if name != "nano":
        return

    # Another run as reference: a row that differs fails.
    record = read_json(out / REFERENCE)
    record["checks"]["caption of cat.jpg"] = {"text": "A dog."}
    write_json(tmp_path / "other.json", record)
    command = ["verify", name, "--device", "cpu", "--reference", str(tmp_path / "other.json")]
    assert main(command) == 1
    assert "| differs: “A dog.” |" in capsys.readouterr().out
