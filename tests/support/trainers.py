"""The training programs at tiny size: a table for tests/e2e/test_trainers.py and
tests/nightly/test_invariants.py.

A new trainer is tested by its entry in `TRAINERS` (invariants: by a row in that file).
"""

import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import lavis_runs
import llm_runs
import torch
import yaml
from data_files import lines
from repository import NANO, ROOT
from warm_processes import PYTHON

from seed_multimodal import MultimodalSystem
from seed_multimodal.diffusion.base import Detokenizer

LLM = ROOT / "MultiModalLLM"
LAVIS = ROOT / "SEED_Tokenizer"
STEADY = ["optim.lr_scheduler_type=constant", "optim.warmup_ratio=0", "optim.min_lr_ratio=0"]
# One scene is drawn every four steps.
FEW_SAMPLES = [
    "trainer.sample_steps=4",
    "++data.held_out={name: scenes, format: nano, options: {number: 1}}",
]
ACCUMULATE = ("trainer.gradient_accumulation_steps=2",)
TWO = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
CAT = ROOT / "images" / "cat.jpg"


@dataclass(frozen=True)
class Trainer:
    """A program that trains.

    Attributes:
        application: its folder. program: its file below the folder.
        parts: writes tiny weights and data into a folder.
        options: (that folder, output folder) → its arguments, without the number of steps.
        use: (that folder, output folder): loads the result and uses it once.
        weights: pattern of a run's final files.
        double: overrides with which one process has the batch of two processes without them.
        log, loss: the log's file and the name of the loss in it.
        zero: the ZeRO stage that it is tested with, or 0.
        close: relative tolerance between losses of one process and of two.
        variables: (that folder) → environment variables.
    """

    name: str
    program: str
    parts: Callable[[Path], Any]
    options: Callable[[Path, Path], list[str]]
    use: Callable[[Path, Path], None]
    weights: str
    application: Path = LLM
    double: Sequence[str] = ACCUMULATE
    log: str = "train.log.jsonl"
    loss: str = "loss"
    zero: int = 0
    close: float = 1e-4
    variables: Callable[[Path], dict[str, str]] = lambda parts_dir: {}

    def arguments(self, parts_dir, output, steps, save: int, more: Sequence[str]) -> list[str]:
        """Arguments of a run of `steps` with a checkpoint every `save`, and further overrides."""
        # LAVIS counts epochs of steps.
        if self.application == LAVIS:
            counts = [
                f"run.iters_per_epoch={steps}",
                "run.max_epoch=1",
                f"run.save_every_steps={save}",
            ]
        else:
            counts = [
                f"output_dir={output}",
                f"trainer.max_steps={steps}",
                f"trainer.save_steps={save}",
                "trainer.curves=false",
            ]
        return [*self.options(parts_dir, output), *counts, *more]

    def start(self, parts_dir, arguments: Sequence[str], *before: str) -> subprocess.Popen[str]:
        """Start the program as a process; `before`: arguments of Python, as `TWO`."""
        return subprocess.Popen(
            [PYTHON, *before, self.program, *arguments],
            cwd=self.application,
            env=llm_runs.environment(**self.variables(parts_dir)),
            text=True,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(self, parts_dir, arguments: Sequence[str], *before: str) -> str:
        """Run the program to its successful end; returns its output."""
        process = self.start(parts_dir, arguments, *before)
        output, errors = process.communicate(timeout=400)
        assert process.returncode == 0, f"{output}\n{errors}"
        return output

    def main(self, arguments: Sequence[str]) -> int:
        """Run the program in this process; returns its exit code."""
        if self.application == LAVIS:
            return int(lavis_runs.program("train").main(list(arguments)))
        from seed_multimodal.training.cli import main

        config = Path(self.program).stem
        return main(config, LLM / "configs", list(arguments))

    def losses(self, output) -> dict[int, float]:
        """Step → loss, in full precision."""
        return llm_runs.losses(output, self.log, self.loss)

    def result(self, output) -> dict:
        """The final weights of a run."""
        from seed_multimodal.state_dicts import load_state_dict

        weights = {}
        # LAVIS keeps the model beside its optimizer.
        for file in sorted(output.glob(self.weights)):
            state = (
                torch.load(file, weights_only=True)["model"]
                if file.suffix == ".pth"
                else load_state_dict(file)
            )
            weights |= {f"{file.stem}.{name}": value for name, value in state.items()}
        assert weights, f"{output} has no {self.weights}"
        return weights


# ---- parts and arguments of each program


def _in_files(config, folder, *groups: str) -> list[str]:
    """Overrides that use one file per group, as a user's configuration does."""
    folder.mkdir(parents=True, exist_ok=True)
    for group in groups:
        (folder / f"{group}.yaml").write_text(yaml.safe_dump(config[group]))
    tokenizer = config["tokenizer"]["pretrained_model_name_or_path"]
    files = [f"{group}={folder / group}.yaml" for group in groups]
    return [f"tokenizer={tokenizer}", *files, *STEADY]


def _llm(parts_dir, output) -> list[str]:
    groups = ("model", "data", "trainer", "optim", "tokenizer")
    files = {group: parts_dir / f"{group}.yaml" for group in groups}
    return [*llm_runs.overrides(files, output), *STEADY]


def _llm_parts(parts_dir):
    """A LLaMA in files, so that a checkpoint of LoRA is a system."""
    lora = {**llm_runs.LORA, "lora_dropout": 0.0}
    model = {"path": str(llm_runs.write_base(parts_dir / "base")), "sizes": None, "lora": lora}
    llm_runs.write_files(parts_dir, model=model)


def _hub_llm_parts(parts_dir, lora: dict | None):
    """A Qwen 3 with tied, padded tables, which get rows for image tokens, and its tokenizer."""
    from tiny.language import random_llm, write_hub_tokenizer

    from seed_multimodal.language.hub_tokenizer import HubTokenizer

    # The words of the data, and tokens for images.
    base = parts_dir / "qwen3"
    write_hub_tokenizer(base, llm_runs.WORDS)
    tokenizer = HubTokenizer.create(base, llm_runs.CODES, llm_runs.PER_IMAGE)
    tokenizer.save_pretrained(parts_dir / "tokenizer")
    fields = {"tie_word_embeddings": True, "initializer_range": 0.1}
    fields |= tokenizer.special_ids
    random_llm("qwen3", tokenizer.vocabulary.n_text + 14, **fields).save_pretrained(base)
    llm_runs.write_files(
        parts_dir,
        model={"sizes": None, "path": str(base), "lora": lora},
        tokenizer={"pretrained_model_name_or_path": str(parts_dir / "tokenizer")},
    )


def _written_by(module: str, function: str = "write_parts") -> Callable[[Path], Any]:
    """A function of a module of tests/support, imported on use: these imports are slow."""
    return lambda parts_dir: getattr(import_module(module), function)(parts_dir)


def _seed_x_parts(parts_dir):
    """The parts of `tuning_parts` and conversations without images (a third of the batches)."""
    import tuning_parts

    tuning_parts.write_parts(parts_dir)
    texts = [f"Make it {name}." for name in tuning_parts.COLOURS]
    records = ({"data": [text, "It is done."]} for text in texts)
    lines(parts_dir / "words.jsonl", records)


def _seed_x(parts_dir, output) -> list[str]:
    import tuning_parts

    data = tuning_parts.data_of(parts_dir, seed=4)
    words = {"name": "words", "files": str(parts_dir / "words.jsonl"), "weight": 2.0}
    data["sources"].append({**data["sources"][0], **words})
    lora = {**tuning_parts.LORA, "lora_dropout": 0.0}
    config = tuning_parts.config_of(parts_dir, output, data=data, lora=True, model={"lora": lora})
    groups = ("model", "agent", "visual_encoder", "data", "optim", "trainer")
    return _in_files(config, parts_dir / "files", *groups)


def _lavit(parts_dir, output) -> list[str]:
    import pretrain_parts

    config = pretrain_parts.config_of(parts_dir, output)
    groups = ("model", "visual_encoder", "data", "optim", "trainer")
    return _in_files(config, parts_dir / "files", *groups)


def _pixels(*settings: str, data: str = "tiny") -> Callable[[Path, Path], list[str]]:
    """The group's `tiny` files; `{}` in a setting is the folder of the parts."""
    groups = ["model=tiny", f"data={data}", "trainer=tiny", "optim=tiny"]
    return lambda parts_dir, output: [
        *groups,
        *FEW_SAMPLES,
        *(setting.replace("{}", str(parts_dir)) for setting in settings),
    ]


def _lavis(stage: str, *settings: str) -> Callable[[Path, Path], list[str]]:
    return lambda parts_dir, output: [
        *lavis_runs.write_config(stage, parts_dir, output),
        "--options",
        *settings,
    ]


def _rl_parts(parts_dir):
    """Four prompts of nano, which its judge scores."""
    from seed_nano.report.reward import prompt_records

    lines(parts_dir / "prompts.jsonl", prompt_records(4, 1)[0])
    data = {
        "prompts": str(parts_dir / "prompts.jsonl"),
        "rewards": [{"name": "nano", "model": "nano"}],
        "batch_size": 2,
        "group_size": 2,
        "drawing": {"num_inference_steps": 1},
    }
    (parts_dir / "data.yaml").write_text(yaml.safe_dump(data))


def _rl(parts_dir, output) -> list[str]:
    groups = ("model", "optim", "trainer")
    files = [*(f"{group}=nano" for group in groups), f"data={parts_dir / 'data.yaml'}"]
    steps = ["trainer.logging_steps=1", "trainer.sample_steps=4", "trainer.save_total_limit=null"]
    return [*files, *steps]


# ---- use of each result


def _is_evaluated(stage: str) -> Callable[[Path, Path], None]:
    """The result's losses of held-out images are measured."""

    def use(parts_dir, output):
        config = lavis_runs.write_config(stage, parts_dir, output.with_name("used"))
        saved = [
            "model.load_pretrained=False",
            "model.load_finetuned=True",
            f"model.finetuned={output / 'checkpoint_0.pth'}",
            "run.test_splits=[val]",
        ]
        assert lavis_runs.program("evaluate").main([*config, "--options", *saved]) == 0

    return use


def _export_lavit(parts_dir, output):
    from seed_multimodal.cli.main import main

    vision = NANO / "seed_tokenizer" / "diffusion_model" / "image_encoder"
    checkpoint = output / "checkpoint_0.pth"
    folder = output / "exported"
    arguments = f"export-tokenizer --lavit {checkpoint} --vision {vision} --out {folder}"
    assert main(arguments.split()) == 0


def _describes(**options) -> Callable[[Path, Path], None]:
    """The last checkpoint is a system, which describes an image."""

    def use(parts_dir, output):
        checkpoint = max(output.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
        system = MultimodalSystem.from_pretrained(checkpoint, device="cpu", log=None, **options)
        assert isinstance(system.describe(CAT, max_new_tokens=4), str)

    return use


def _draws(family: str) -> Callable[[Path, Path], None]:
    """The result draws an image; `family`: of `tiny.training`."""

    def use(parts_dir, output):
        chosen = getattr(import_module("tiny.training"), family)
        detokenizer = chosen.load(parts_dir, output / chosen.result)
        options = {"num_inference_steps": 2, "guidance_scale": 1.0, "height": 16, "width": 16}
        images = detokenizer(chosen.inputs(detokenizer)[:1], seeds=[0], **options)
        assert images[0].size == (16, 16)

    return use


# ---- the table

# The image tokenizers' stages, which one program trains.
_STAGE = {
    "application": LAVIS,
    "program": "train.py",
    "parts": lavis_runs.write_images,
    "weights": "checkpoint_0.pth",
    "loss": "last_loss",
}
TRAINERS = [
    Trainer(
        "stage1",
        options=_lavis("stage1"),
        use=_is_evaluated("stage1"),
        double=["run.batch_size_train=16"],
        log="stage1.log.jsonl",
        **_STAGE,
    ),
    # Dead codes are restarted between checkpoints.
    Trainer(
        "stage2",
        options=_lavis(
            "stage2", "model.load_pretrained=False", "model.restart_every=3", "run.num_workers=1"
        ),
        use=_is_evaluated("stage2"),
        double=(),
        log="stage2.log.jsonl",
        **_STAGE,
    ),
    Trainer(
        "lavit_tokenizer",
        options=_lavis("lavit"),
        use=_export_lavit,
        double=(),
        log="lavit-stage1.log.jsonl",
        **_STAGE,
    ),
    # Language models.
    Trainer(
        "llm",
        "src/train/train.py",
        _llm_parts,
        _llm,
        _describes(),
        "checkpoint-*/adapter_model.safetensors",
        zero=3,
    ),
    Trainer(
        "seed_x_sft",
        "src/train/train_seed_x_sft.py",
        _seed_x_parts,
        _seed_x,
        _describes(load_decoder=False),
        "checkpoint-*/model.safetensors",
        zero=3,
    ),
    Trainer(
        "lavit",
        "src/train/train_lavit.py",
        _written_by("pretrain_parts"),
        _lavit,
        _describes(load_decoder=False),
        "checkpoint-*/[mv]*.safetensors",
        zero=3,
    ),
    Trainer(
        "rl",
        "src/train/train_rl.py",
        _rl_parts,
        _rl,
        _describes(),
        "checkpoint-*/model.safetensors",
        loss="reward",
    ),
    # Pixel decoders.
    Trainer(
        "seed_x_detokenizer",
        "src/train/train_seed_x_detokenizer.py",
        _written_by("tiny.training", "write_detokenizer_parts"),
        _pixels(
            "model.sdxl={}/sdxl",
            "model.visual_encoder={}/vision",
            "model.stage=2",
            "trainer.ema=0",
            data="tiny_edits",
        ),
        _draws("SEED_X"),
        "adapter/model.safetensors",
        zero=2,
        variables=lambda parts_dir: {"EDITS": str(parts_dir / "edits.jsonl")},
    ),
    Trainer(
        "lavit_detokenizer",
        "src/train/train_lavit_detokenizer.py",
        _written_by("tiny.training", "write_lavit_parts"),
        _pixels(
            "model.diffusion={}/highres", "model.tokenizer={}/tokenizer", "model.decoder={}/decoder"
        ),
        _draws("LAVIT"),
        "pixels/*/*.safetensors",
    ),
    Trainer(
        "seed_decoder",
        "src/train/train_seed_decoder.py",
        _written_by("tiny.training", "write_seed_decoder_parts"),
        _pixels(
            "model.diffusion={}/kl",
            "model.tokenizer={}/tokenizer",
            "model.scheduler={_class_name: FlowMatchEulerDiscreteScheduler}",
        ),
        _draws("SEED"),
        "decoder/*/*.safetensors",
    ),
    Trainer(
        "tiny_decoder",
        "src/train/train_autoencoder.py",
        _written_by("tiny.training", "write_seed_decoder_parts"),
        _pixels("model.diffusion={}/kl"),
        lambda _, output: Detokenizer.load_part(output, "vae").decode(torch.zeros(1, 4, 8, 8)),
        "vae/*.safetensors",
    ),
    Trainer(
        "recorded_codes_decoder",
        "src/train/train_seed_decoder.py",
        _written_by("tiny.training", "write_seed_decoder_parts"),
        _pixels(
            "model.diffusion={}/kl",
            "model.tokenizer=null",
            "model.reads=ids",
            "+model.recorded={codebook_size: 8, codes_per_image: 16}",
            "data.sources=[{name: recorded, files: {}/recorded.jsonl}]",
            "++data.held_out=null",
        ),
        _draws("SEED"),
        "decoder/*/*.safetensors",
    ),
]
# The language model's trainer with a hub model, with LoRA and with all weights.
_LLM_TRAINER = next(entry for entry in TRAINERS if entry.name == "llm")
HUB_LLMS = [
    replace(
        _LLM_TRAINER,
        name="qwen3_lora",
        parts=lambda parts_dir: _hub_llm_parts(parts_dir, {"r": 4, "lora_dropout": 0.0}),
    ),
    replace(
        _LLM_TRAINER,
        name="qwen3",
        parts=lambda parts_dir: _hub_llm_parts(parts_dir, None),
        weights="checkpoint-*/model.safetensors",
    ),
]
