"""A YAML file and `--options` → LAVIS's `Config`, with every key and name checked first.

LAVIS fails on a wrong name with an assertion or a missing attribute deep inside; here each is one sentence that names
the file, the key and the nearest right one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from seed_lavis.builders import dataset_section
from seed_lavis.compat import Config, registry
from seed_lavis.datasets import dataset_ratios
from seed_lavis.options import APPLICATION, RunOptions, section_at
from seed_lavis.runner import RunnerSeed
from seed_multimodal.config import load_yaml
from seed_multimodal.device import choose_device
from seed_multimodal.errors import ConfigError, first_line
from seed_multimodal.settings import nearest, read_settings

SECTIONS = ("model", "datasets", "run", "preprocess")


def load_config(cfg_path: str, options: Sequence[str]) -> Any:
    """The checked configuration of a run; `run.output_dir` is absolute in it, `run.device` is a device that exists.

    Raises:
        ConfigError: one sentence about what is wrong.
    """
    file = _find(cfg_path)
    for option in options:
        if "=" not in option:
            raise ConfigError(f"--options takes KEY=VALUE, for example run.max_epoch=1, not {option!r}.")
        if option.partition(".")[0] not in SECTIONS:
            raise ConfigError(f"--options {option}: the key must begin with {', '.join(SECTIONS[:3])}"
                              f"{nearest(option.partition('.')[0], SECTIONS)}.")
    given = load_yaml(file)
    try:
        user = OmegaConf.merge(given, OmegaConf.from_dotlist(list(options)))
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(f"--options {' '.join(options)}: not KEY=VALUE in YAML ({first_line(error)}).") from error
    assert isinstance(user, DictConfig)
    for section in ("model", "datasets", "run"):
        if section not in user:
            raise ConfigError(f"{file}: has no section {section!r}.")
    _check_names(file, user)
    config = Config(argparse.Namespace(cfg_path=str(file), options=list(options)))
    read_settings(registry.get_model_class(config.model_cfg.arch).options_type, config.model_cfg, f"{file}: model")
    run = config.run_cfg
    checked = read_settings(RunOptions, run, f"{file}: run")
    for key, value in vars(checked).items():  # defaults included, so that LAVIS's own code sees them too
        run[key] = value
    run.output_dir = str(Path(checked.output_dir).absolute())
    run.device = str(choose_device(checked.device, log=None).device)
    _check_run(file, checked)
    dataset_ratios(config.datasets_cfg, checked.train_dataset_ratios)
    return config


def _find(cfg_path: str) -> Path:
    for place in (Path(cfg_path), APPLICATION / cfg_path):
        if place.is_file():
            return place
    raise ConfigError(f"{cfg_path}: there is no such configuration file.")


def _check_names(file: Path, user: DictConfig) -> None:
    model, run = user.model, user.run
    _known(f"{file}: model.arch", model.get("arch"), registry.get_model_class, registry.list_models)
    kinds = registry.get_model_class(model.arch).PRETRAINED_MODEL_CONFIG_DICT
    _known(f"{file}: model.model_type", model.get("model_type", "pretrain"), kinds.get, lambda: list(kinds))
    if "model_type" not in model:
        raise ConfigError(f"{file}: model.model_type is not given (pretrain).")
    for name, section in dataset_section(user.get("datasets")).items():
        _known(f"{file}: datasets", name, registry.get_builder_class,
               lambda: list(registry.mapping["builder_name_mapping"]))
        if not isinstance(section, DictConfig):
            raise ConfigError(f"{file}: datasets.{name} must be a section of keys (vis_processor, build_info …), it is "
                              f"{section!r}.")
        for key in ("vis_processor", "text_processor"):
            processors = section_at(section, key, f"{file}: datasets.{name}")
            for split in processors:
                processor = section_at(processors, split, f"{file}: datasets.{name}.{key}")
                _known(f"{file}: datasets.{name}.{key}.{split}.name", processor.get("name"),
                       registry.get_processor_class, registry.list_processors)
    _known(f"{file}: run.task", run.get("task"), registry.get_task_class, registry.list_tasks)
    _known(f"{file}: run.runner", run.get("runner", "runner_seed"), registry.get_runner_class, registry.list_runners)
    if not issubclass(registry.get_runner_class(run.get("runner", "runner_seed")), RunnerSeed):
        raise ConfigError(f"{file}: run.runner must be runner_seed: LAVIS's own {run.runner} needs CUDA and data sets "
                          "of another form.")
    _known(f"{file}: run.lr_sched", run.get("lr_sched", "linear_warmup_cosine_lr"), registry.get_lr_scheduler_class,
           registry.list_lr_schedulers)


def _known(where: str, name: Any, find: Callable[[str], Any], names: Callable[[], list[str]]) -> None:
    if name is None:
        raise ConfigError(f"{where} is not given: use {', '.join(sorted(names()))}.")
    if find(str(name)) is None:
        raise ConfigError(f"{where}: there is no {str(name)!r}{nearest(str(name), names())}; known are "
                          f"{', '.join(sorted(names()))}.")


def _check_run(file: Path, run: RunOptions) -> None:
    if run.iters_per_epoch % run.accum_grad_iters:
        raise ConfigError(f"{file}: run.iters_per_epoch ({run.iters_per_epoch}) must be a multiple of "
                          f"run.accum_grad_iters ({run.accum_grad_iters}), so that epochs end after a whole step.")
