"""`seed init --llm … --encoder …`: the files that it writes are those of the trainings."""

import json
import os
import pkgutil
import re
import shutil
from pathlib import Path

import pytest
from lavis_runs import require_lavis
from llm_runs import compose, environment
from real_processes import run_process
from repository import APPLICATION, ROOT

from seed_multimodal.cli.init import init
from seed_multimodal.cli.main import build_parser
from seed_multimodal.cli.recipe import SCRIPT, Step, script_lines
from seed_multimodal.cli.tiny_parts import write_tiny_encoder, write_tiny_llm
from seed_multimodal.images.transforms import CLIP_MEAN
from seed_multimodal.models.registry import find_training
from seed_multimodal.pretokenize.inputs import read_input_settings

CAPTIONS = ["a red apple on the table", "a blue bird in the tree"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    write_tiny_llm("mistral", CAPTIONS, folder / "llm")
    write_tiny_encoder("dinov2", folder / "encoder")
    return folder


def write(out, *flags) -> Path:
    args = build_parser().parse_args(["init", *map(str, flags), str(out)])
    assert init(args) == 0
    return out


def overrides(command: str, out) -> list[str]:
    """Of a training's command, with a value for each variable of run.sh but its folder."""
    words = command.replace("$OUT", str(out)).split()[3:]
    return [re.sub(r"\$[A-Z_]+", "1", word) for word in words]


def lavis_config(file):
    """A stage's configuration, read by the application."""
    require_lavis()
    from seed_lavis.options import load_config

    return load_config(str(file), [])


@pytest.mark.slow
@pytest.mark.parametrize("decoder, reads", [("flow", "codes"), ("unclip", "embedding")])
def test_recipe_of_full_size(parts, decoder, reads, tmp_path, capsys):
    from seed_multimodal.language.hub_tokenizer import load_text_tokenizer

    # With own data, and with those to be put into the folder.
    flags = ["--llm", parts / "llm", "--encoder", parts / "encoder", "--qlora", "--json"]
    pairs, chats = "data/pairs", "data/chats.jsonl"
    if decoder == "flow":
        pairs, chats = (
            str(ROOT / "images"),
            str(ROOT / "MultiModalLLM/examples/own_data/talk.json"),
        )
        flags += ["--data", pairs, "--chats", chats]
    sizes = ["--decoder", decoder, "--codes", 16, "--codebook", 64]
    out = write(tmp_path / "mine", *flags, *sizes)
    steps = {step["name"]: step for step in json.loads(capsys.readouterr().out)["steps"]}

    # 1. Both stages, with the published settings and the encoder's images.
    for stage in (1, 2):
        config = lavis_config(out / f"stage{stage}.yaml")
        assert config.run_cfg.iters_per_epoch == 5000
        assert config.model_cfg.num_query_token == 16
        assert config.model_cfg.vit == {"type": "hub", "path": str(parts / "encoder")}
        dataset = config.datasets_cfg.conceptual_caption_3m
        assert dataset.vis_processor.train.image_size == 64
        assert dataset.build_info.files == str(out / pairs)
    assert config.model_cfg.n_embed == 64

    # 2. The language model and the decoder, as their programs read them.
    for step, program, config_name in (
        ("pretrain", "train", "train"),
        ("sft", "train", "train"),
        ("decoder", "train_seed_decoder", "seed_decoder/train"),
    ):
        configs = APPLICATION / "configs" / config_name
        arguments = overrides(steps[step]["command"], out)
        config = compose(arguments, configs.parent, configs.name)
        run = pkgutil.resolve_name(find_training(program).task).run_type.read(config)
        if step == "decoder":
            assert run.model.reads == reads
            assert run.data.encoder_size == 64
            assert [str(source.files) for source in run.data.sources] == [str(out / pairs)]
        else:
            assert run.model.lora["r"] == 16
            assert run.model.quantization == "4bit"
            assert run.data.length == 512  # of the base's positions

    # 3. What is encoded.
    assert read_input_settings(out / "captions.yaml").files == str(out / pairs)
    settings = read_input_settings(out / "chats.yaml")
    assert settings.files == str(out / chats)
    assert settings.image_root == (None if decoder == "flow" else f"{out}/data/images")
    needed = re.search(r"(?m)^NEEDED=(.*)", (out / "run.sh").read_text())
    for path in (pairs, chats):
        assert path in (out / "README.md").read_text()
        assert needed is not None and (path in needed[1]) == (decoder == "unclip")
    assert load_text_tokenizer(out / "llm_tokenizer").vocabulary.n_codes == 64


@pytest.mark.slow
def test_tiny_parts_of_the_classes_of_folders(parts, tmp_path):
    # A model of the same class, the tokenizer's files, and the images' mean.
    from seed_multimodal.language.llm import llm_config
    from seed_multimodal.models.seed.checkpoints import load_vision
    from seed_multimodal.nn.vision.registry import read_vision_config

    flags = ["--size", "tiny", "--llm", parts / "llm", "--encoder", parts / "encoder"]
    out = write(tmp_path / "mine", *flags)
    tokenizer = (out / "parts/llm/tokenizer.json").read_bytes()
    assert tokenizer == (parts / "llm/tokenizer.json").read_bytes()
    assert llm_config(out / "parts/llm").model_type == "mistral"
    encoder = read_vision_config({"type": "hub", "path": str(out / "parts/encoder")}, "vit").build()
    load_vision(encoder, out / "parts/encoder", log=None)
    assert encoder.config.network["model_type"] == "dinov2"
    assert encoder.preprocessing.mean == CLIP_MEAN


@pytest.mark.parametrize(
    "name, types", [("gemma3_text", ["sliding_attention", "full_attention"]), ("qwen3_moe", None)]
)
def test_tiny_llm_has_few_experts_and_all_types_of_layers(name, types, tmp_path):
    # A small network of every kind of layer, so that a trial fails where the large one would.
    from seed_multimodal.language.llm import llm_config

    write_tiny_llm(name, CAPTIONS, tmp_path / "llm")
    assert (tmp_path / "llm/model.safetensors").stat().st_size < 20e6
    assert llm_config(tmp_path / "llm").to_dict().get("layer_types") == types


@pytest.mark.slow
def test_small_unclip_decoder_trains_and_reads_the_embedding(tmp_path, capsys):
    # The one of `flow` is trained by tests/e2e/test_recipe.py.
    from tiny.seed import IMAGE_SIZE, write_seed2

    from seed_multimodal.models.seed.code_adapter import CODE_ADAPTER, CodeAdapter
    from seed_multimodal.recipes.seed.train_detokenizer import SeedDecoderTask

    out = write(tmp_path / "mine", "--size", "tiny", "--decoder", "unclip", "--json")
    steps = json.loads(capsys.readouterr().out)["steps"]
    command = next(step["command"] for step in steps if step["name"] == "decoder")
    write_seed2(tmp_path / "tokenizer")
    arguments = [
        *overrides(command, out),
        "data.batch_size=2",
        f"data.encoder_size={IMAGE_SIZE}",
        f"model.tokenizer={tmp_path / 'tokenizer'}",
    ]
    configs = APPLICATION / "configs" / "seed_decoder"
    SeedDecoderTask.train(compose(arguments, configs))
    adapter = CodeAdapter.from_pretrained(out / "decoder" / "decoder" / CODE_ADAPTER)
    assert adapter.config.reads == "embedding"


def run_steps(out, length, *names: str) -> list[str]:
    """Call run.sh of a training, a step that reads its result, and a training from that result;
    returns the steps that ran, and warnings about files."""
    steps = [
        Step("first", "", "first/$LENGTH", "mkdir -p $OUT/first/$LENGTH"),
        Step("merge", "first/$LENGTH", "merged", "cp -r $OUT/first/$LENGTH $OUT/merged"),
        Step("second", "merged", "second/2", "make_second data=$OUT/second.yaml"),
        Step("other", "", "codes/other/done", "mkdir -p $OUT/codes/other/done"),
    ]
    script = out / "run.sh"
    if not script.is_file():
        (out / "second.yaml").write_text(f"rate: 1\npath: {out}/data\n")
        head = (
            f'OUT="{out}"\nNEEDED=\nSTEPS=" $* "\nmake_second() {{ mkdir -p "$OUT/second/2"; }}\n'
        )
        script.write_text(head + SCRIPT.read_text() + script_lines(steps))
    options = {"env": {**os.environ, "LENGTH": str(length)}, "cwd": out.parent}
    done = run_process(["bash", str(script), *names], **options)
    lines = re.findall(r"(?m)^== (\w+)$|(\S+ changed since)", done.stderr)
    return [step or warning for step, warning in lines]


@pytest.mark.process
def test_steps_whose_inputs_changed_run_again(tmp_path):
    # 1. The first call runs all steps, and the second none.
    assert run_steps(tmp_path, 5) == ["first", "merge", "second", "other"]
    assert run_steps(tmp_path, 5) == []

    # 2. A longer training continues in its folder. What reads it begins again, also if the training
    #    is shorter and already there, or is made again.
    assert run_steps(tmp_path, 6) == ["first", "merge", "second"]
    assert sorted(path.name for path in (tmp_path / "first").iterdir()) == ["5", "6"]
    assert (tmp_path / "merged-1").is_dir()
    assert run_steps(tmp_path, 5) == ["merge", "second"]
    shutil.rmtree(tmp_path / "first")
    assert run_steps(tmp_path, 5) == ["first", "merge", "second"]
    assert (tmp_path / "second-3").is_dir()

    # 3. Without its inputs no step runs, and an unfinished one runs again.
    assert run_steps(tmp_path, 7, "merge") == []
    (tmp_path / ".steps" / "other.unfinished").touch()
    assert run_steps(tmp_path, 5) == ["other"]


@pytest.mark.process
def test_copied_folder_is_finished_and_an_edited_file_is_named(tmp_path):
    out = tmp_path / "first place"
    out.mkdir()
    assert run_steps(out, 5) == ["first", "merge", "second", "other"]

    # 1. All files are as new as the copy, and paths in them are those of the copy.
    copy = shutil.copytree(out, tmp_path / "second place", copy_function=shutil.copyfile)
    shutil.rmtree(out)
    assert run_steps(copy, 5) == []
    assert f"{copy}/data" in (copy / "second.yaml").read_text()

    # 2. An edited file is named; a finished step stays until its result is moved away.
    (copy / "second.yaml").write_text("rate: 2\n")
    assert run_steps(copy, 5) == ["second.yaml changed since"]
    shutil.rmtree(copy / "second")
    assert run_steps(copy, 5) == ["second.yaml changed since", "second"]
    assert run_steps(copy, 5) == []


@pytest.mark.process
@pytest.mark.parametrize(
    "steps, named",
    [
        (["stage1", "sfft"], "sfft"),
        pytest.param(["captions", "chats"], "== captions", marks=pytest.mark.nightly),
        ([], "data/pairs"),
    ],
    ids=["no step", "a step that fails", "no data"],
)
def test_run_script_that_ends_early(parts, steps, named, tmp_path):
    # It names the fault, and no later step begins.
    out = write(tmp_path / "my recipe", "--llm", parts / "llm", "--encoder", parts / "encoder")
    (out / "tokenizer").mkdir()
    script = ["bash", str(out / "run.sh"), *steps]
    done = run_process(script, env=environment())
    assert done.returncode == 2
    assert named in done.stderr
    assert "== stage1" not in done.stderr and "== chats" not in done.stderr
