"""Loading and saving of networks: a folder with `config.json` (the network's sizes) and
`model.safetensors`.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import pickle
import re
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from seed_multimodal.disk import read_json_object, replace_json
from seed_multimodal.errors import CheckpointError, ConfigError, first_line
from seed_multimodal.nn.layers import Network
from seed_multimodal.progress import quiet_loading
from seed_multimodal.settings import DataclassInstance, read_settings
from seed_multimodal.state_dicts import (
    LoadReport,
    assign_strictly,
    integer_weights,
    load_state_dict,
    refuse_integers,
    refuse_tensors,
    save_state_dict,
)

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
CODEBOOK_STATE = "quantize.ema_"  # moving averages

# Of missing and damaged files.
FILE_ERRORS = (
    OSError,
    EOFError,
    UnicodeDecodeError,
    json.JSONDecodeError,
    pickle.UnpicklingError,
    SafetensorError,
)
_thread = threading.local()

Config = TypeVar("Config", bound=DataclassInstance)


class HubUpload:
    """Adds `push_to_hub` to a class with `save_pretrained`."""

    save_pretrained: Callable[..., Path]

    def push_to_hub(self, repo_id: str, *, private: bool = False) -> str:
        """Upload the output of `save_pretrained` to a hub repository, created if missing; returns
        its URL."""
        from huggingface_hub import HfApi

        with tempfile.TemporaryDirectory() as temporary:
            address = HfApi().create_repo(repo_id, private=private, exist_ok=True)
            HfApi().upload_folder(
                repo_id=repo_id, folder_path=self.save_pretrained(Path(temporary) / "model")
            )
        return str(address)


class PretrainedNetwork(nn.Module, HubUpload, Generic[Config]):
    """Base of networks that are built as `cls(config)`, an instance of the dataclass
    `config_class`.
    """

    config_class: type[Config]
    model_type: ClassVar[str] = ""
    config: Config
    load_report: LoadReport | None = None

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    @classmethod
    def read_config(cls, file: str | Path) -> Config:
        """Sizes from a `config.json`.

        Raises `ConfigError`: of another model, or with an unknown key or value.
        """
        values = dict(read_json_object(Path(file), ConfigError))
        if values.pop("model_type", cls.model_type) != cls.model_type:
            raise ConfigError(f"{file}: this is not the configuration of a {cls.__name__}.")
        return read_settings(cls.config_class, values, str(file))

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Load a folder in eval mode with frozen parameters. Raises `CheckpointError`."""
        folder = Path(folder)
        state = load_state_dict(folder / WEIGHTS, mapped=True)
        config = cls.read_config(folder / CONFIG)
        return cls.from_state_dict(config, state, folder, device=device, dtype=dtype)

    @classmethod
    def from_state_dict(
        cls,
        config: Config,
        state: Mapping[str, Tensor],
        source: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        allow_missing: Iterable[str] = (),
        allow_unexpected: Iterable[str] = (),
        foreign: bool = False,
    ) -> Self:
        """A network of these tensors, not copied where they fit.

        The last three arguments and the errors are those of `assign_strictly`.
        """
        # Without memory of its own the network takes over the tensors themselves.
        network = without_memory(lambda: cls(config)).cast(dtype)
        network.load_report = assign_strictly(
            network, state, source, allow_missing, allow_unexpected, foreign=foreign, device=device
        )
        return network.to(device).requires_grad_(False).eval()

    def cast(self, dtype: torch.dtype) -> Self:
        """Convert parameters without memory; those that a subclass keeps stay in float32."""
        return self._apply(lambda tensor: tensor.to(dtype) if tensor.is_meta else tensor)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write both files, without the state of a codebook's training."""
        folder = Path(folder)
        state = self.state_dict()
        weights = {name: state[name] for name in state if not name.startswith(CODEBOOK_STATE)}
        save_state_dict(weights, folder / WEIGHTS)
        values = {"model_type": self.model_type} if self.model_type else {}
        values |= dataclasses.asdict(self.config)
        replace_json(folder / CONFIG, values)
        return folder


def saved_config(config_class: type[Config], model_type: str, folder: Path) -> Config | None:
    """Sizes in a folder's `config.json`; None without it, or if it is another model's."""
    file = folder / CONFIG
    values = dict(read_json_object(file)) if file.is_file() else {}
    if values.pop("model_type", None) != model_type:
        return None
    return read_settings(config_class, values, str(file))


@contextmanager
def reading_files(source: str | Path, label: str, advice: str) -> Iterator[None]:
    """Context in which a library reads a folder or hub id.

    Raises CheckpointError: a file is missing or damaged. Other errors of the library are raised as
    they are.
    """
    try:
        yield
    except Exception as error:
        # The reader of tokenizers raises nothing else than `Exception` itself.
        if isinstance(error, FILE_ERRORS) or type(error) is Exception:
            raise CheckpointError(
                f"{source}: not a complete {label} ({first_line(error)}); {advice}."
            ) from error
        # Some damage ends in errors of any type.
        for file in Path(source).glob("*.json"):
            read_json_object(file)
        for file in Path(source).glob("*.bin"):
            load_state_dict(file, mapped=True)
        raise


def load_library_model(
    model_class: Any,
    source: str | Path,
    label: str,
    advice: str,
    *,
    has_blocks: bool = True,
    **options: Any,
) -> tuple[Any, list[str]]:
    """A network of transformers in eval mode, and names of tensors it does not read.

    model_class: of the network, or an `Auto…` class, with the `config` of `options`.
    source: a folder or hub id.
    label, advice: for messages. options: of `from_pretrained`.
    has_blocks: False: those of the file are not wanted.

    Raises CheckpointError: damaged, or a tensor is missing, of another size or kind or of a further
    block.
    """
    with quiet_loading("transformers"), torch.device("cpu"):
        isolated = isolated_class(model_class, options.get("config"))
        with reading_files(source, label, advice):
            network, info = isolated.from_pretrained(
                source,
                local_files_only=Path(source).is_dir(),
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **options,
            )
    network.__class__ = isolated.__base__

    # The libraries fill such tensors with random values.
    misshapen = sorted(
        f"{name} (file {tuple(stored)}, model {tuple(expected)})"
        for name, stored, expected in info["mismatched_keys"]
    )
    refuse_tensors(misshapen, (), source, f"of another size than in {CONFIG}")
    missing = sorted(info["missing_keys"])
    refuse_tensors(missing, ("*position_ids",), source, f"missing from the file ({advice})")
    if getattr(network.config, "quantization_config", None) is None:
        refuse_integers(integer_weights(Path(source)), source)
    unknown = sorted(info["unexpected_keys"])
    if has_blocks:
        _refuse_further_blocks(network, unknown, source)
    return network.eval(), unknown


def load_diffusers_network(
    network_class: Any,
    config: Mapping[str, Any],
    state: dict[str, Tensor],
    source: str | Path,
    dtype: torch.dtype,
) -> nn.Module:
    """A network of diffusers in eval mode, by its configuration and tensors.

    Its own `from_pretrained` replaces functions of torch meanwhile, for all threads.

    Raises CheckpointError: a tensor is missing, of another size or kind or of a further block.
    """
    with quiet_loading("diffusers"):
        network = without_memory(lambda: network_class.from_config(config)).to(dtype)
    network._fix_state_dict_keys_on_load(state)  # old names
    # Published files hold tensors that diffusers does not read.
    report = assign_strictly(network, state, source, allow_unexpected=["*"])
    _refuse_further_blocks(network, report.ignored, source)
    return network.eval()


def _refuse_further_blocks(network: nn.Module, unknown: Iterable[str], source: str | Path) -> None:
    """Raise CheckpointError for tensors of blocks behind the last one of a network's lists."""
    lengths = {
        name: len(module)
        for name, module in network.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
    }
    further = [
        name
        for name in unknown
        for index in re.finditer(r"\.(\d+)(?=\.)", name)
        if int(index[1]) >= lengths.get(name[: index.start()], math.inf)
    ]
    refuse_tensors(further, (), source, f"of blocks that the model of {CONFIG} does not have")


def isolated_class(model_class: Any, config: Any) -> Any:
    """A subclass of a class of transformers that loads its networks without changing the process.

    transformers sets torch's default dtype meanwhile and replaces functions of torch and of its own
    classes, for all threads.

    model_class: may be an `Auto…` class, which chooses by `config`.
    """
    from transformers.models.auto.auto_factory import _BaseAutoModelClass, _get_model_class

    if issubclass(model_class, _BaseAutoModelClass):
        model_class = _get_model_class(config, model_class._model_mapping)

    class Isolated(model_class):  # type: ignore[misc]
        @classmethod
        def get_init_context(cls, dtype: torch.dtype, *options: object) -> list[Any]:
            return [torch.device("meta"), InitialValues(dtype)]

        def tie_weights(self, missing_keys: Any = None, **options: Any) -> None:
            if missing_keys is not None:  # not before the weights are loaded
                super().tie_weights(missing_keys, **options)

        def initialize_weights(self) -> None:
            with torch.no_grad():
                inspect.unwrap(super().initialize_weights.__func__)(self)

    Isolated.__name__ = model_class.__name__  # of which tables of renamed tensors know
    Isolated.__module__ = model_class.__module__
    return Isolated


class InitialValues(TorchFunctionMode):
    """Context in which this thread builds a network whose values are then loaded.

    New floats have `dtype` and are not random: torch's default and generator are those of all
    threads.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        options = dict(kwargs or {})
        # 1. No random values.
        if function in (Tensor.normal_, Tensor.uniform_):
            return args[0].zero_()
        if function in (nn.init.kaiming_uniform_, nn.init.normal_, nn.init.uniform_):
            return options["tensor"]
        if function is Tensor.div_ and args[0].is_meta:  # torch would import sympy for it
            return args[0]
        if function in (torch.rand, torch.randn):
            function = torch.zeros

        # 2. The dtype, unless the call or its arguments name one.
        result = function(*args, **options)
        is_default = function in _device_constructors() and options.get("dtype") is None
        if is_default and result.dtype == torch.get_default_dtype() != self.dtype:
            result = function(*args, **{**options, "dtype": self.dtype})
        return result


def without_memory(build: Callable[[], Network]) -> Network:
    """A network whose parameters have no memory yet; its buffers have their start values."""
    _thread.without_memory = True
    try:
        with torch.device("cpu"), InitialValues():
            return build()
    finally:
        _thread.without_memory = False


def _to_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
    # Tied parameters and networks of other threads stay as they are.
    if parameter.is_meta or not getattr(_thread, "without_memory", False):
        return None
    return nn.Parameter(parameter.to("meta"), parameter.requires_grad)


# For good: a hook that is removed breaks the loop of a thread that registers a parameter meanwhile.
register_module_parameter_registration_hook(_to_meta)
