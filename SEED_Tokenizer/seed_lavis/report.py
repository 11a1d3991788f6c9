"""The end of a run: what was done, and the commands that come next, which work from any folder."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from tqdm import tqdm

from seed_lavis.options import APPLICATION, locate
from seed_multimodal.disk import read_json_object, replace_text, writing
from seed_multimodal.hub import PARTS
from seed_multimodal.language.tokenizer import ADDED, read_files
from seed_multimodal.seed.configuration import QFormerConfig

# What stage 2 takes over of a run of stage 1.
OF_MODEL = ("vit", "qformer", "image_size", "num_query_token", "cross_attention_freq", "vit_weights", "vit_precision")
OF_RUN = ("num_workers", "seed", "amp", "precision", "train_splits", "valid_splits", "train_dataset_ratios",
          "max_bad_in_a_row")


def summary(runner: Any, record: dict[str, Any]) -> list[str]:
    """Lines for the end of a run."""
    stage, steps = runner.model.stage, record["steps"]
    images = steps * record["batch_size"] * record.get("accumulate", 1) * record.get("processes", 1)
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in record.items()
                        if name.startswith("loss") and isinstance(value, float))
    commands = (shlex.join(command) for command in next_commands(runner, record["checkpoint"]))
    return [f"{stage}: {steps:,} steps, {images:,} images in {tqdm.format_interval(record['seconds'])}; at the end "
            f"{numbers}; {record['bad_samples']} bad samples were replaced.", f"  checkpoint {record['checkpoint']}",
            *(f"Next: {command}" for command in commands)]


def next_commands(runner: Any, checkpoint: str) -> list[list[str]]:
    """Evaluation on the run's own data, then stage 2, or the export and the use of the tokenizer."""
    options, stage, out = runner.model.options, runner.model.stage, str(runner.folder / "tokenizer")
    split = (runner.options.valid_splits or runner.options.train_splits)[0]
    evaluation = ["python", str(APPLICATION / "evaluate.py"), "--cfg-path", str(runner.folder / "config.yaml"),
                  "--options", "model.load_finetuned=True", f"model.finetuned={checkpoint}",
                  f"run.test_splits=[{split}]"]
    if stage == "stage1":
        script = APPLICATION / "train_scripts" / "codebook.sh"
        return [evaluation, ["env", f"CONFIG={write_stage2(runner, checkpoint)}", "sh", str(script)]]
    if stage != "lavit-stage1" and not options.load_pretrained:
        return [evaluation]  # an export needs a stage 1
    export = ["seed", "export-tokenizer", "--out", out]
    export += ["--vision", str(Path(runner.model.vision_file).absolute())] if runner.model.vision_file else []
    if stage == "lavit-stage1":
        system = str(runner.folder / "system")
        more = [[*export, "--lavit", checkpoint], ["seed", "assemble", "lavit", "--tokenizer", out, "--out", system]]
    else:
        stage1, system = Path(locate(str(options.pretrained))).absolute(), out
        export += ["--stage1", str(stage1), "--stage2", checkpoint]
        words = language_tokenizer(stage1, options.n_embed) if stage == "stage2" else None
        more = [[*export, *(["--text-tokenizer", str(words.absolute())] if words else [])]]
    return [evaluation, *more, ["seed", "tokenize", str(APPLICATION.parent / "images" / "cat.jpg"), "--model", system]]


def write_stage2(runner: Any, checkpoint: str) -> str:
    """`stage2.yaml` in the run's folder: the published settings of stage 2 (where the Q-Former is smaller, nano's) on
    this run's data, with its sizes and vision encoder; a CLIP that it used gives the target."""
    given, model = runner.config.config, runner.model
    project = "blip2/train" if model.config.qformer.width >= QFormerConfig.width else "nano"
    made = OmegaConf.load(APPLICATION / "lavis" / "projects" / project / "pretrain_codebook.yaml")
    for key in OF_MODEL:
        made.model.pop(key, None)
    made.model.update({key: given.model[key] for key in OF_MODEL if given.model.get(key) is not None})
    made.run.update({key: given.run[key] for key in OF_RUN})
    made.datasets, made.run.output_dir = given.datasets, f"{runner.folder}_codebook"
    made.model.update(pretrained=checkpoint, decode_heads=model.config.qformer.heads)
    for clip in filter(None, (model.options.vit_weights, model.options.clip_model)):
        file = Path(locate(clip), "config.json")
        if file.is_file() and "projection_dim" in (sizes := read_json_object(file)):
            made.model.update(clip_model=clip, image_features_dim=sizes["projection_dim"])
    words = Path(locate(str(model.options.text_tokenizer)))
    if (words / ADDED).is_file():
        made.model.n_embed = read_files(words).vocabulary.n_codes
    with writing(file := runner.folder / "stage2.yaml"):
        replace_text(file, OmegaConf.to_yaml(made))
    return str(file)


def language_tokenizer(stage1: Path, codes: int) -> Path | None:
    """The folder of a language tokenizer with words for so many codes: the one whose word pieces stage 1 read (by the
    config.yaml beside its checkpoint), else the released one; None: neither is here."""
    config = stage1.with_name("config.yaml")
    used = OmegaConf.select(OmegaConf.load(config), "model.text_tokenizer") if config.is_file() else None
    places = (Path(locate(str(name))) for name in (used, PARTS["tokenizer"].folder) if name)
    return next((place for place in places
                 if (place / ADDED).is_file() and read_files(place).vocabulary.n_codes == codes), None)
