"""Earlier names of modules: imports and `_target_`s of them still work."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

PACKAGE = "seed_multimodal."
# Earlier → current name of modules and of objects in YAML, without the package; the longest that
# matches counts.
MOVED = {
    "cli.lavit": "compat.lavit_programs",
    "cli.seed": "compat.seed_llama_programs",
    "cli.seed_x": "compat.seed_x_programs",
    "configured": "compat.seed_llama_yaml",
    "data.decoders.lavit": "models.lavit.data",
    "data.decoders.seed_x": "models.seed_x.data",
    "data.formats.released_pickles": "compat.pickled_shards",
    "data.original_pipes": "compat.data_files",
    "data.pretokenize.encode.lavit_codes": "models.lavit.codes.lavit_codes",
    "data.pretokenize.lavit_codes": "models.lavit.codes",
    "language.llama": "language.llm",
    "language.tasks": "language.prompts",
    "lavit": "models.lavit",
    "lavit.original": "compat.lavit",
    "lavit.training": "models.lavit.losses",
    "models.seed_x.views": "images.views",
    "nn.eva": "nn.vision.eva",
    "seed": "models.seed",
    "seed.original": "compat.seed_llama",
    "seed.training": "models.seed.losses",
    "seed_x": "models.seed_x",
    "seed_x.original": "compat.seed_x_yaml",
    "seed_x.views": "images.views",
    "seed_x.vision": "nn.vision.qwen",
    "serving.flask_app": "serving.app",
    "system": "pipelines",
    "systems": "pipelines",
    "systems.lavit": "models.lavit.pipeline",
    "systems.seed1": "compat.seed_llama",
    "systems.seed_x": "models.seed_x.pipeline",
    "training.lavit": "models.lavit",
    "training.lavit.detokenizer": "models.lavit.train_pixels",
    "training.lavit.pretrain": "models.lavit.train_llm",
    "training.lavit.rows": "models.lavit.train_rows",
    "training.lavit.tokenizer_task": "models.lavit.train_tokenizer",
    "training.llm.cli": "training.cli",
    "training.seed_x": "models.seed_x",
    "training.seed_x.detokenizer": "models.seed_x.train_detokenizer",
    "training.seed_x.tuning": "models.seed_x.train_agent",
}


def current_name(name: str) -> str:
    """The current name of a module, or of an object in one; other names unchanged."""
    if not name.startswith(PACKAGE):
        return name
    parts = name.removeprefix(PACKAGE).split(".")
    for length in range(len(parts), 0, -1):
        new = MOVED.get(".".join(parts[:length]))
        if new is not None:
            return PACKAGE + ".".join([new, *parts[length:]])
    return name


class _MovedModule(Loader):
    """Loads a module by its current name."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(current_name(spec.name))
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec  # that of the earlier name was set before


class _MovedModules(MetaPathFinder):
    """Finds earlier names, before other finders would load a second copy below a moved package."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if current_name(fullname) == fullname:
            return None
        return ModuleSpec(fullname, _MovedModule())


def install() -> None:
    """Make earlier names importable."""
    sys.meta_path.insert(0, _MovedModules())
