"""From images to answers by the application's own commands: tokenise, pretrain, merge, tune, merge,
ask."""

import runpy
import sys
from pathlib import Path

import pytest
from llm_runs import environment
from real_processes import run_checked
from repository import APPLICATION, NANO, ROOT
from tiny import read_json, write_json
from warm_processes import PYTHON

from seed_multimodal import MultimodalSystem


def run_tool(program: str, *arguments):
    """A command in MultiModalLLM, as the documentation gives it, in this process."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.chdir(APPLICATION)
        patch.setattr(sys, "argv", [program, *map(str, arguments)])
        runpy.run_path(program, run_name="__main__")
    assert not ended.value.code


def tokenise(tool: str, description: str, folder, *more: str):
    """One of the extraction tools on an input description."""
    settings = folder.with_suffix(".yaml")
    settings.write_text(description)
    run_tool(
        f"src/tools/extract_image_ids_to_torchdata_parallel{tool}.py",
        *f"--tokenizer configs/tokenizer/nano.yaml --data {settings}".split(),
        *f"--save_dir {folder} --num_workers 0".split(),
        *more,
    )


def train(out, model: str, files: Path, decoder: str, steps, *more: str) -> Path:
    """A run of the trainer on one source; returns its last checkpoint."""
    data = out.with_suffix(".yaml")
    source = {"name": "mine", "files": str(files), "decoder": decoder}
    write_json(data, {"sources": [source], "length": 360, "rows": 1})
    groups = f"model={model} tokenizer=nano data={data} optim=nano trainer=nano"
    run_checked(
        [PYTHON, "src/train/train.py", *groups.split(), f"trainer.max_steps={steps}"]
        + [f"output_dir={out}", *more],
        cwd=APPLICATION,
        timeout=170,
        env=environment(),
    )
    assert (out / "curves.png").is_file()
    return out / f"checkpoint-{steps}"


def merge(adapter: Path, out, model, tokenizer):
    """The merging tool with the original's flags."""
    run_tool(
        "src/tools/merge_lora_weights.py",
        *(
            f"--model_cfg {model} --tokenizer_cfg {tokenizer} --lora_model {adapter} "
            f"--save_path {out}"
        ).split(),
    )


@pytest.mark.process
@pytest.mark.nightly
@pytest.mark.timeout(300)
def test_from_images_to_answers(tmp_path):
    # 1. Codes of captioned images and of a conversation about two of them.
    tokenise(
        "",
        "{format: nano, format_options: {split: pairs, content: captions, number: 16}}",
        tmp_path / "captions",
    )
    tokenise(
        "_chat",
        f"files: {APPLICATION / 'examples/own_data/talk.json'}\nimage_root: {ROOT / 'images'}\n",
        tmp_path / "talk",
        "--views",
        "4",
    )

    # 2. Two trainings, each merged into the language model.
    pretrained = train(
        tmp_path / "pretrain", "nano_lora", tmp_path / "captions", "pretrain.caption", 4
    )
    merge(
        pretrained,
        tmp_path / "pretrained",
        "configs/model/nano_lora.yaml",
        "configs/tokenizer/nano.yaml",
    )
    tuned = train(
        tmp_path / "sft",
        "nano_lora",
        tmp_path / "talk",
        "chat",
        45,
        f"model.path={tmp_path / 'pretrained'}",
    )

    # 3. A system of the merged model answers as in the conversation, which nano does not know.
    system = tmp_path / "system"
    merge(tuned, system / "seed_llama", *[tuned.parent / "config.yaml"] * 2)  # the run's own
    (system / "seed_tokenizer").symlink_to(NANO / "seed_tokenizer")
    settings = read_json(NANO / "system.json")
    for key in ("notice", "known_words", "known_images"):
        del settings[key]
    write_json(system / "system.json", settings)
    seed = MultimodalSystem.from_pretrained(system)
    for name, answer, expected in (
        ("fox.png", "Rusty.", "It lives in the wood."),
        ("whale.png", "Wanda.", "It swims in the sea."),
    ):
        talk = [{"role": "user", "content": [ROOT / "images" / name, "What is its name?"]}]
        reply = seed.chat(talk)
        assert (reply.text, reply.note) == (answer, "")
        talk += [
            {"role": "assistant", "content": answer},
            {"role": "user", "content": "What do you know about it?"},
        ]
        assert seed.chat(talk).text == expected
