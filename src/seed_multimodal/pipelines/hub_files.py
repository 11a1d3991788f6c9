"""Files of a system's folder by which transformers loads it: `config.json`, `processor_config.json`
and the module of `trust_remote_code=True`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from seed_multimodal.disk import JsonObject, replace_text
from seed_multimodal.models.registry import find_family
from seed_multimodal.pipelines.config import SystemConfig

REMOTE_CODE = Path(__file__).with_name("modeling_seed_multimodal.py")


def write_hub_files(config_class: type[SystemConfig], folder: Path) -> None:
    """Write the three files."""
    name = find_family(config_class.system).system_name
    model = f"{name}ForConditionalGeneration"
    module = REMOTE_CODE.stem

    # 1. The model.
    config: JsonObject = {
        "model_type": config_class.system,
        "architectures": [model],
        "auto_map": {
            "AutoConfig": f"{module}.{name}Config",
            "AutoModelForMultimodalLM": f"{module}.{model}",
        },
    }
    replace_text(folder / "config.json", json.dumps(config, indent=1) + "\n")

    # 2. The processor.
    processor = {
        "processor_class": f"{name}Processor",
        "auto_map": {"AutoProcessor": f"{module}.{name}Processor"},
    }
    replace_text(folder / "processor_config.json", json.dumps(processor, indent=1) + "\n")

    # 3. The module.
    shutil.copyfile(REMOTE_CODE, folder / REMOTE_CODE.name)
