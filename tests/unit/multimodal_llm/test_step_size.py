"""The size of a step: rows that follow from the released micro-batches, the memory plan, and what is said of both."""

from __future__ import annotations

import json

import pytest
import yaml

from seed_multimodal.errors import ConfigError
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.training.llm.memory import FREE_BYTES, FREE_SHARE, GIB, LlamaSizes, Spread, memory_plan

STEPS = 4


@pytest.fixture
def open_rows(runs, tmp_path) -> dict:
    """The data of `llm_runs`, its rows left open: released micro-batches of 16 x 64 and 12 x 96 positions."""
    runs.write_files(tmp_path / "files")
    data = yaml.safe_load((tmp_path / "files" / "data.yaml").read_text())
    for source, size in zip(data["sources"], (16, 12), strict=True):
        source["batch_size"] = size
    return {**data, "rows": "auto"}


@pytest.mark.slow
def test_packed_steps_have_the_tokens_of_padded_ones(runs, train, open_rows, capsys):
    padded = train("padded", "trainer.max_steps=30", data={**open_rows, "packing": False})
    said = capsys.readouterr().out
    assert "a step: padded micro-batches of up to 1,152 positions x 1 micro-step x 1 process.\n" in said
    packed = train("packed", f"trainer.max_steps={STEPS}", data=open_rows)
    said = capsys.readouterr().out
    tokens = {name: [line["tokens"] for line in runs.log_lines(home) if "tokens" in line][-1] / steps
              for name, home, steps in (("padded", padded, 30), ("packed", packed, STEPS))}
    assert tokens["packed"] == pytest.approx(tokens["padded"], rel=0.1)
    rows = json.loads((packed / "summary.json").read_text())["rows"]
    assert rows > 2
    assert f"a step: {rows} packed rows of 160 x 1 micro-step x 1 process = {rows * 160:,} positions" in said
    assert "released micro-batches: 1,067 positions, of which " in said and "useful tokens a step" in said
    assert "memory plan: none on cpu" in said


@pytest.mark.slow
def test_rows_that_do_not_fit_become_micro_steps_of_the_same_step(runs, train, open_rows, capsys):
    whole = train("whole", f"trainer.max_steps={STEPS}", data=open_rows)
    assert "would not fit" not in capsys.readouterr().out
    rows = json.loads((whole / "summary.json").read_text())["rows"]
    words = MultimodalTokenizer.from_pretrained(runs.TOKENIZER).vocabulary.size
    sizes = LlamaSizes(32, 64, 2, 32, 32, words)
    plan = memory_plan(sizes, Spread(), lora=None, precision="fp32", base_bytes=4.0, checkpointing=False,
                       positions=rows * 160)
    memory = (plan.fixed + 1.5 * 160 * plan.position + FREE_BYTES) / (1 - FREE_SHARE)  # a row and a half
    split = train("split", f"trainer.max_steps={STEPS}", f"trainer.memory_gib={memory / GIB:.6f}",
                  data=open_rows)
    said = capsys.readouterr().out
    summary = json.loads((split / "summary.json").read_text())
    assert summary["rows"] * summary["micro_steps"] == rows and summary["rows"] < rows
    assert f"would not fit, so a step has {summary['rows']} x {summary['micro_steps']} instead" in said
    assert "memory plan (an estimate): " in said
    # The same rows, so the same steps; each micro-batch has its place in the mean over the step's tokens.
    assert runs.losses(split) == pytest.approx(runs.losses(whole), rel=1e-4)


@pytest.mark.process
@pytest.mark.slow
def test_the_first_of_several_processes_decides(runs, train, open_rows, tmp_path):
    """Two processes make the steps of one with twice the micro-steps: the same rows of the same streams."""
    one = train("one", f"trainer.max_steps={STEPS}", "trainer.gradient_accumulation_steps=2", data=open_rows)
    rows = json.loads((one / "summary.json").read_text())["rows"]
    two = tmp_path / "two"
    said, _ = runs.run(runs.overrides(runs.write_files(tmp_path / "files", data=open_rows), two,
                                      f"trainer.max_steps={STEPS}"), before=runs.torchrun())
    assert said.count(f"a step: {rows} packed rows of 160 x 1 micro-step x 2 processes = ") == 1
    assert runs.losses(two) == pytest.approx(runs.losses(one), rel=1e-4)


def test_check_machine_refuses_a_batch_that_does_not_fit_the_memory(runs, train, tmp_path):
    runs.write_files(tmp_path / "files")
    data = yaml.safe_load((tmp_path / "files" / "data.yaml").read_text())
    for packing in (True, False):
        sources = [{**source, "batch_size": 10**8} for source in data["sources"]]
        with pytest.raises(ConfigError, match=r"a micro-batch of [\d,]+ positions needs [\d,]+ GiB, and this machine "
                           r"has .*lower rows \(or batch_size\)"):
            train("large", data={**data, "sources": sources, "rows": 10**8, "packing": packing})
