"""YAML files: the original defaults, every project and data set, wrong keys and values."""

from pathlib import Path

import pytest
from lavis_runs import APPLICATION
from yaml_tables import read_tables

from seed_multimodal.errors import ConfigError

TABLES = read_tables(__file__)
OF_BOTH = {"weight_decay": 0.05, "beta2": 0.999, "num_workers": 4, "seed": 42, "amp": True}


@pytest.mark.parametrize("name", TABLES["original"])
def test_load_config_of_the_original_projects(name):
    # The published recipes of both stages.
    from seed_lavis.compat import registry
    from seed_lavis.options import load_config

    from seed_multimodal.settings import read_settings

    config = load_config(f"lavis/projects/blip2/train/{name}", [])
    options_type = registry.get_model_class(config.model_cfg.arch).options_type
    model = read_settings(options_type, config.model_cfg, "model")
    run, options = TABLES["original"][name]
    expected = {**run, **OF_BOTH}
    assert {key: config.run_cfg[key] for key in expected} == expected
    assert {key: getattr(model, key) for key in options} == options
    assert Path(config.run_cfg.output_dir).is_absolute()


def test_load_config_of_every_project_and_data_set():
    # No shipped file has a key that its reader does not know.
    from seed_lavis.compat import registry
    from seed_lavis.options import load_config

    for file in sorted((APPLICATION / "lavis" / "projects").rglob("*/pretrain_*.yaml")):
        assert load_config(str(file), []).model_cfg.arch in registry.list_models()
    for name, builder in registry.mapping["builder_name_mapping"].items():
        assert builder().config.build_info, name


STEADY = ["run.warmup_steps=0", "run.min_lr=1e-5", "run.warmup_lr=-1"]


@pytest.mark.parametrize("schedule, unread", TABLES["unread"].items())
def test_keys_that_a_schedule_does_not_read_are_refused(schedule, unread):
    # A warm-up that is ignored shows in the loss only.
    from seed_lavis.options import load_config

    options = [f"run.lr_sched={schedule}", *STEADY]
    file = "lavis/projects/blip2/train/pretrain_qformer.yaml"
    every = TABLES["unread"]["constant"]
    load_config(file, [*options, *(f"run.{option}" for option in every if option not in unread)])
    for option in unread:
        with pytest.raises(ConfigError, match=f"{option.partition('=')[0]} .*{schedule}"):
            load_config(file, [*options, f"run.{option}"])
