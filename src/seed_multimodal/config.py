"""YAML configurations: objects built from `_target_`, restricted to this package.

A `_target_` is a name of `ALIASES` (the original repositories' dotted names), or a public function or class of this
package; it is called with the node's other keys. `${oc.env:PROJECT_ROOT}` is the folder with `.project-root`.
"""

from __future__ import annotations

import inspect
import os
import pkgutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from seed_multimodal.errors import ConfigError, first_line
from seed_multimodal.settings import check_keys, nearest

# The original's names → ours (`module:attribute`). Their YAML files work unchanged.
ALIASES = {
    "models.model_tools.get_pretrained_llama_causal_model": "seed_multimodal.configured:language_model",
    "transformers.LlamaForCausalLM.from_pretrained": "seed_multimodal.configured:language_model",
    "models.seed_llama_tokenizer.SeedLlamaTokenizer.from_pretrained": "seed_multimodal.seed.original:SeedLlamaTokenizer.from_pretrained",
    "src.tokenizer.seed_llama_tokenizer.SeedLlamaTokenizer.from_pretrained": "seed_multimodal.seed.original:SeedLlamaTokenizer.from_pretrained",
    "models.transforms.get_transform": "seed_multimodal.images.transforms:get_transform",
    "src.processer.transforms.get_transform": "seed_multimodal.images.transforms:get_transform",
    "src.model.llama_xformer.LlamaForCausalLM.from_pretrained": "seed_multimodal.compat.seed_x:LlamaForCausalLM.from_pretrained",
    "src.model.peft_model.get_peft_model_with_resize_embedding": "seed_multimodal.compat.lora:seed_llama_lora",
    # SEED-X's (its programs read the same files as descriptions: `seed_x.original.TARGETS`)
    "transformers.LlamaTokenizer.from_pretrained": "seed_multimodal.language.llama_tokenizer:LlamaTokenizer.from_pretrained",
    "src.models.tokenizer.qwen_visual.VisionTransformerWithAttnPool.from_pretrained": "seed_multimodal.compat.seed_x:VisionTransformerWithAttnPool.from_pretrained",
    "src.models.tokenizer.qwen_visual.Resampler": "seed_multimodal.compat.seed_x:Resampler",
    "src.models.tokenizer.discrete_models.DiscreteModleIdentity": "seed_multimodal.compat.seed_x:DiscreteModleIdentity",
    "src.models.mllm.modeling_llama_xformer.LlamaForCausalLM.from_pretrained": "seed_multimodal.compat.seed_x:LlamaForCausalLM.from_pretrained",
    "src.models.mllm.peft_models.get_peft_model_with_resize_embedding": "seed_multimodal.compat.lora:seed_x_lora",
    "peft.LoraConfig": "seed_multimodal.compat.lora:lora_config",
    "src.models.mllm.seed_x.ContinuousLVLM": "seed_multimodal.compat.seed_x:ContinuousLVLM",
    "src.models.mllm.seed_x.ContinuousLVLM.from_pretrained": "seed_multimodal.compat.seed_x:ContinuousLVLM.from_pretrained",
    "src.models.detokenizer.resampler.ResamplerXLV2": "seed_multimodal.compat.detokenizer:ResamplerXLV2",
    "src.models.detokenizer.adapter_modules.SDXLAdapter.from_pretrained": "seed_multimodal.compat.detokenizer:SDXLAdapter.from_pretrained",
    "src.models.detokenizer.adapter_modules.SDXLAdapterWithLatentImage.from_pretrained": "seed_multimodal.compat.detokenizer:SDXLAdapterWithLatentImage.from_pretrained",
    # An earlier name of ours.
    "seed_multimodal.data.pretokenize.lavit_codes.lavit_codes": "seed_multimodal.data.pretokenize.encode:lavit_codes",
}
PREFIX = "seed_multimodal."
_RESERVED = ("_target_", "_recursive_", "_convert_")


def project_root(start: str | Path | None = None) -> Path:
    """The nearest folder with a `.project-root` file, upwards from `start`, then from here; else the current one."""
    for place in (start, Path.cwd(), Path(__file__)):
        path = Path(place or ".").resolve()
        for folder in (path, *path.parents):
            if (folder / ".project-root").is_file():
                return folder
    return Path.cwd()


def load_yaml(path: str | Path) -> DictConfig:
    """A YAML mapping, its interpolations resolved. Raises ConfigError: missing, not readable, or one that fails."""
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"{file}: no such configuration file.")
    return resolve(read_yaml(file), file)


def resolve(config: DictConfig, file: Path) -> DictConfig:
    """Resolve interpolations in place; `${oc.env:PROJECT_ROOT}` is the root above `file`. Raises ConfigError."""
    set_by_user = os.environ.get("PROJECT_ROOT")
    os.environ["PROJECT_ROOT"] = set_by_user or str(project_root(file.parent))
    try:
        OmegaConf.resolve(config)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{file}: {first_line(error)}") from error
    finally:
        if set_by_user is None:
            del os.environ["PROJECT_ROOT"]
    return config


def read_yaml(file: Path) -> DictConfig:
    """A YAML mapping, its interpolations unresolved. Raises ConfigError: not readable, not YAML, or not a mapping."""
    try:
        config = OmegaConf.load(file)
    except (OmegaConfBaseException, YAMLError, ValueError, OSError, RecursionError) as error:
        raise ConfigError(f"{file}: not readable as YAML ({first_line(error)}).") from error
    if not isinstance(config, DictConfig):
        raise ConfigError(f"{file}: must contain a mapping of keys to values.")
    return config


def instantiate(config: Mapping[str, Any] | str | Path, **overrides: Any) -> Any:
    """Call the `_target_` of a configuration (a node, or a YAML file) with its keys, nested nodes first; `overrides`
    replace keys of the top node. Raises ConfigError: no `_target_`, one not allowed, unknown or missing keys."""
    return instantiate_by(ALIASES, config, **overrides)


def instantiate_by(
    aliases: Mapping[str, str], config: Mapping[str, Any] | str | Path, **overrides: Any
) -> Any:
    """As `instantiate`, with other objects behind the originals' names."""
    where = "configuration"
    if isinstance(config, str | Path):
        where, config = str(config), load_yaml(config)
    if "_target_" not in config:
        raise ConfigError(f"{where}: has no _target_, so there is nothing to build.")
    return _build({**config, **overrides}, where, aliases)


def find_target(
    name: str, where: str = "configuration", aliases: Mapping[str, str] = ALIASES
) -> Callable[..., Any]:
    """The callable behind a `_target_`. Raises ConfigError: neither an alias nor a public object of this package."""
    full = aliases.get(name, name.replace(":", "."))
    if not full.startswith(PREFIX):
        raise ConfigError(
            f"{where}: _target_ {name!r} is not allowed{nearest(name, aliases)}: a configuration may "
            f"only build objects of {PREFIX.rstrip('.')}."
        )
    try:
        found = pkgutil.resolve_name(full)
    except (AttributeError, ValueError):
        found = None
    # Names that a module imports (os, torch, …) are not allowed.
    if (
        "._" in full
        or not callable(found)
        or not str(getattr(found, "__module__", "")).startswith(PREFIX)
    ):
        raise ConfigError(f"{where}: _target_ {name!r} is not a function or class of this package.")
    return found


def _build(value: Any, where: str, aliases: Mapping[str, str]) -> Any:
    """A value of a configuration, with everything below it that has a `_target_` built."""
    if isinstance(value, DictConfig | ListConfig):
        value = OmegaConf.to_container(value, resolve=True)
    if isinstance(value, list):
        return [_build(one, f"{where}[{number}]", aliases) for number, one in enumerate(value)]
    if not isinstance(value, dict):
        return value
    arguments = {
        key: _build(one, f"{where}: {key}", aliases)
        for key, one in value.items()
        if key not in _RESERVED
    }
    if "_target_" not in value:
        return arguments
    target = find_target(str(value["_target_"]), where, aliases)
    signature = inspect.signature(target)
    if not any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
        check_keys(arguments, signature.parameters, where)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise ConfigError(f"{where}: {value['_target_']}: {error}.") from None
    return target(**arguments)
