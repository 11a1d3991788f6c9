"""Loading and saving of networks: a folder with `config.json` (the network's sizes) and
`model.safetensors`.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from seed_multimodal.disk import read_json_object, replace_text
from seed_multimodal.errors import CheckpointError, ConfigError, first_line
from seed_multimodal.nn.layers import Network
from seed_multimodal.progress import quiet_loading
from seed_multimodal.settings import DataclassInstance, read_settings
from seed_multimodal.state_dicts import (
    LoadReport,
    assign_strictly,
    load_state_dict,
    refuse_tensors,
    save_state_dict,
)

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
CODEBOOK_STATE = "quantize.ema_"  # moving averages

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
            network,
            state,
            source,
            allow_missing,
            allow_unexpected,
            foreign=foreign,
            device=device,
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
        replace_text(folder / CONFIG, json.dumps(values, indent=2) + "\n")
        return folder


def saved_config(config_class: type[Config], model_type: str, folder: Path) -> Config | None:
    """Sizes in a folder's `config.json`; None without it, or if it is another model's."""
    file = folder / CONFIG
    values = dict(read_json_object(file)) if file.is_file() else {}
    if values.pop("model_type", None) != model_type:
        return None
    return read_settings(config_class, values, str(file))


def load_library_model(
    model_class: Any, source: str | Path, label: str, advice: str, **options: Any
) -> tuple[Any, list[str]]:
    """A network of transformers or diffusers in eval mode, and names of tensors it does not read.

    source: a folder or hub id.
    label, advice: for messages. options: of the library's `from_pretrained`.

    Raises CheckpointError: damaged, or a tensor is missing or of another size.
    """
    try:
        library = model_class.__module__.partition(".")[0]
        with quiet_loading(library), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            network, info = model_class.from_pretrained(
                source,
                local_files_only=Path(source).is_dir(),
                output_loading_info=True,
                **options,
            )
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001  (damaged and unsafe files raise many types)
        raise CheckpointError(
            f"{source}: not a complete {label} ({first_line(error)}); {advice}."
        ) from error

    # The libraries fill such tensors with random values.
    misshapen = sorted(
        f"{name} (file {tuple(stored)}, model {tuple(expected)})"
        for name, stored, expected in info["mismatched_keys"]
    )
    refuse_tensors(misshapen, (), source, f"of another size than in {CONFIG}")
    missing = sorted(info["missing_keys"])
    refuse_tensors(missing, ("*position_ids",), source, f"missing from the file ({advice})")
    return network.eval(), sorted(info["unexpected_keys"])


def without_memory(build: Callable[[], Network]) -> Network:
    """A network whose parameters have no memory yet; its buffers have their start values."""
    thread = threading.get_ident()

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        # Tied parameters and networks of other threads stay as they are.
        if parameter.is_meta or threading.get_ident() != thread:
            return None
        return nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    hook = register_module_parameter_registration_hook(to_meta)
    try:
        with torch.random.fork_rng(devices=[]):
            return build()
    finally:
        hook.remove()
