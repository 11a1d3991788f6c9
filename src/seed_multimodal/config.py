"""YAML configurations: read, override, and build objects from `_target_`, without letting a file run arbitrary code.

What: `load_yaml` reads a file through OmegaConf (`${oc.env:PROJECT_ROOT}` is the folder with `.project-root`);
`instantiate` calls the `_target_` a node names with the node's other keys.
`_target_` is looked up in an alias table (the original repository's dotted names, so that its YAML files keep working)
or must name a public function or class of this package. Unknown keys are errors that name the nearest one.
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
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
    "models.seed_llama_tokenizer.SeedLlamaTokenizer.from_pretrained": "seed_multimodal.configured:seed_llama_tokenizer",
    "src.tokenizer.seed_llama_tokenizer.SeedLlamaTokenizer.from_pretrained":
        "seed_multimodal.configured:seed_llama_tokenizer",
    "models.transforms.get_transform": "seed_multimodal.images.transforms:get_transform",
    "src.processer.transforms.get_transform": "seed_multimodal.images.transforms:get_transform",
    # SEED-X's: what describes a part of the system, without loading it
    "transformers.LlamaTokenizer.from_pretrained": "seed_multimodal.seed_x.original:words",
    "src.models.tokenizer.qwen_visual.VisionTransformerWithAttnPool.from_pretrained":
        "seed_multimodal.seed_x.original:vision_encoder",
    "src.models.tokenizer.qwen_visual.Resampler": "seed_multimodal.seed_x.vision:ResamplerConfig",
    "src.models.tokenizer.discrete_models.DiscreteModleIdentity": "seed_multimodal.seed_x.original:no_discrete_model",
    "src.models.mllm.modeling_llama_xformer.LlamaForCausalLM.from_pretrained":
        "seed_multimodal.seed_x.original:language_model",
    "src.models.mllm.peft_models.get_peft_model_with_resize_embedding":
        "seed_multimodal.seed_x.original:language_model_with_lora",
    "peft.LoraConfig": "seed_multimodal.seed_x.original:lora",
    "src.models.mllm.seed_x.ContinuousLVLM.from_pretrained": "seed_multimodal.seed_x.original:agent",
    "src.models.detokenizer.resampler.ResamplerXLV2": "seed_multimodal.seed_x.adapter:ResamplerSizes",
    "src.models.detokenizer.adapter_modules.SDXLAdapter.from_pretrained": "seed_multimodal.seed_x.original:adapter",
    "src.models.detokenizer.adapter_modules.SDXLAdapterWithLatentImage.from_pretrained":
        "seed_multimodal.seed_x.original:adapter",
}
ALLOWED_PREFIXES = ("seed_multimodal.",)
_RESERVED = ("_target_", "_recursive_", "_convert_")
# What OmegaConf and yaml raise for texts they cannot read; ValueError: a number too long, a file that is not UTF-8.
_UNREADABLE = (OmegaConfBaseException, YAMLError, ValueError, OSError, RecursionError)


def project_root(start: str | Path | None = None) -> Path:
    """The nearest folder with a `.project-root` file, upwards from `start` and then from here; else the current one."""
    for place in (start, Path.cwd(), Path(__file__)):
        if place is None:
            continue
        path = Path(place).resolve()
        for folder in (path, *path.parents):
            if (folder / ".project-root").is_file():
                return folder
    return Path.cwd()


def load_yaml(path: str | Path, overrides: Sequence[str] = ()) -> DictConfig:
    """Read one YAML mapping, apply dotted overrides (`"optim.lr=1e-4"`), and resolve interpolations.

    Raises:
        ConfigError: no such file, not YAML, not a mapping, an unknown override key, an interpolation that fails.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"{file}: there is no such configuration file.")
    config = read_yaml(file)
    for override in overrides:
        _override(config, override, str(file))
    return resolve(config, file)


def read_yaml(file: Path) -> DictConfig:
    """A YAML mapping as it stands, its interpolations unresolved.

    Raises:
        ConfigError: not readable, not YAML, or not a mapping.
    """
    try:
        config = OmegaConf.load(file)
    except _UNREADABLE as error:
        raise ConfigError(f"{file}: not readable as YAML ({first_line(error)}).") from error
    if not isinstance(config, DictConfig):
        raise ConfigError(f"{file}: must hold a mapping of keys to values.")
    return config


def instantiate(config: DictConfig | Mapping[str, Any] | str | Path, **overrides: Any) -> Any:
    """Build what a configuration describes: call its `_target_` with its keys, nested nodes first.

    Args:
        config: a node with `_target_`, or the path of a YAML file that holds one.
        overrides: keyword arguments that replace keys of the top node.

    Raises:
        ConfigError: no `_target_`, one that is not allowed, unknown or missing keys, a `pipe:` address.
    """
    where = "configuration"
    if isinstance(config, str | Path):
        where, config = str(config), load_yaml(config)
    plain = OmegaConf.to_container(config, resolve=True) if isinstance(config, DictConfig) else dict(config)
    assert isinstance(plain, dict)
    if "_target_" not in plain:
        raise ConfigError(f"{where}: has no _target_, so there is nothing to build.")
    return _build({str(key): value for key, value in {**plain, **overrides}.items()}, where)


def find_target(name: str, where: str = "configuration") -> Callable[..., Any]:
    """The callable behind a `_target_`: an alias of the original's, or a public function or class of this package.

    Raises:
        ConfigError: anything else.
    """
    full = ALIASES.get(name, name)
    if not full.startswith(ALLOWED_PREFIXES):
        raise ConfigError(f"{where}: _target_ {name!r} is not allowed{nearest(name, ALIASES)}: a configuration may "
                          f"only build objects of {', '.join(p.rstrip('.') for p in ALLOWED_PREFIXES)}.")
    module, attributes = _split(full)
    found: Any = module
    for attribute in attributes:
        found = None if attribute.startswith("_") else getattr(found, attribute, None)
        if found is None or inspect.ismodule(found):
            raise ConfigError(f"{where}: _target_ {name!r} does not exist.")
    # A module of ours may hold imported names (os, torch, …): those are not offered.
    if not callable(found) or not str(getattr(found, "__module__", "")).startswith(ALLOWED_PREFIXES):
        raise ConfigError(f"{where}: _target_ {name!r} is not a function or class of this package.")
    return found


def _build(node: dict[str, Any], where: str) -> Any:
    target_name = node["_target_"]
    if not isinstance(target_name, str):
        raise ConfigError(f"{where}: _target_ must be a dotted name, not {target_name!r}.")
    target = find_target(target_name, where)
    recursive = node.get("_recursive_", True)
    arguments = {key: _value(value, f"{where}: {key}", recursive)
                 for key, value in node.items() if key not in _RESERVED}
    signature = inspect.signature(target)
    if not any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
        check_keys(arguments, [n for n in signature.parameters if n not in ("self", "cls")], where)
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    missing = [name for name, p in signature.parameters.items()
               if p.default is p.empty and p.kind in named and name not in arguments]
    if missing:
        raise ConfigError(f"{where}: {target_name} needs a value for {missing[0]!r}.")
    return target(**arguments)


def _value(value: Any, where: str, recursive: bool) -> Any:
    if isinstance(value, str) and value.strip().startswith("pipe:"):
        raise ConfigError(f"{where}: 'pipe:' addresses run shell commands and are refused.")
    if isinstance(value, DictConfig | ListConfig):
        value = OmegaConf.to_container(value, resolve=True)
    if isinstance(value, dict):
        if recursive and "_target_" in value:
            return _build({str(k): v for k, v in value.items()}, where)
        return {k: _value(v, f"{where}.{k}", recursive) for k, v in value.items()}
    if isinstance(value, list):
        return [_value(v, f"{where}[{i}]", recursive) for i, v in enumerate(value)]
    return value


def _split(full: str) -> tuple[Any, list[str]]:
    """The longest importable module of a dotted (or `module:attribute`) name, and the attributes that remain."""
    parts = full.replace(":", ".").split(".")
    for count in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:count])
        try:
            return importlib.import_module(name), parts[count:]
        except ModuleNotFoundError as error:
            # A missing dependency of ours is another matter than a name that does not exist.
            if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
                raise
    raise ConfigError(f"{full!r} does not name a module.")


def _override(config: DictConfig, override: str, where: str) -> None:
    key, equals, _ = override.partition("=")
    if not equals:
        raise ConfigError(f"{where}: the override {override!r} is not of the form key=value.")
    node: Any = config
    parts = key.split(".")
    for depth, part in enumerate(parts):
        if not isinstance(node, DictConfig):
            raise ConfigError(f"{where}: {'.'.join(parts[:depth])!r} holds no keys, so {key!r} cannot be set.")
        check_keys([part], [str(k) for k in node], where)
        node = node._get_node(part)
    try:
        config.merge_with_dotlist([override])
    except _UNREADABLE as error:
        raise ConfigError(f"{where}: the override {override!r} cannot be read ({first_line(error)}).") from error


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
