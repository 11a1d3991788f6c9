"""Settings of a run, and what its stages share: folders, pool of scenes, cached tensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import field, make_dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError, safe_open
from torch import Tensor
from yaml import YAMLError

from seed_multimodal.config import read_yaml
from seed_multimodal.device import choose_device
from seed_multimodal.errors import CheckpointError, ConfigError, first_line
from seed_multimodal.models.seed.modeling import Seed2Tokenizer
from seed_multimodal.nn.vision.eva import EvaConfig
from seed_multimodal.settings import read_settings, setting
from seed_multimodal.state_dicts import save_state_dict
from seed_multimodal.training.config import StageSettings
from seed_nano.world.records import from_last_image, record_at
from seed_nano.world.scene import Scene
from seed_nano.world.splits import scene_at
from seed_nano.world.things import first_things

ROOT = Path(__file__).resolve().parents[3]
PRESETS = Path(__file__).resolve().parents[1] / "presets"
TRAIN = "train_"  # beginning of the sections that are `StageSettings`
STAGE_SETTING_NAMES = {
    "steps": "max_steps",
    "lr": "learning_rate",
    "warmup": "warmup_steps",
    "clip": "max_grad_norm",
    "accumulate": "gradient_accumulation_steps",
    "log_every": "logging_steps",
    "save_every_steps": "save_steps",
    "keep": "save_total_limit",
}  # short names of a stage's settings
QUIET = (
    "report_to",
    "run_name",
    "logging_steps",
    "save_seconds",
    "save_steps",
    "save_total_limit",
    "async_save",
    "resume",
    "curves",
    "timeout_minutes",
)  # settings of a stage that change no number
Settings = Any  # of a system: the keys of its defaults.yaml, see `load_settings`


# ---- settings


def load_settings(system: str, file: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """The settings of a system: its defaults.yaml, then a preset or a YAML file, then `key=value`
    overrides.

    Raises:
        ConfigError: missing file, unknown key (the nearest is named), wrong type.
    """
    path = Path(file) if str(file).endswith(".yaml") else PRESETS / system / f"{file}.yaml"
    if not path.is_file():
        raise ConfigError(f"{path}: no such settings file.")
    label = f"{path} and command line" if overrides else str(path)
    try:
        defaults = _with_full_names(read_yaml(PRESETS / system / "defaults.yaml"))
        preset = _with_full_names(read_yaml(path))
        command_line = _with_full_names(OmegaConf.from_dotlist(list(overrides)))
        values: Any = OmegaConf.merge(defaults, preset, command_line)
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(f"{label}: {first_line(error)}.") from error
    settings: Settings = read_settings(_settings_type(system, defaults), values, label)
    # bf16 falls back to fp32 where the hardware lacks it.
    if not has_bf16(choose_device(settings.device, torch.float32, log=None).device):
        for stage in vars(settings).values():
            if isinstance(stage, StageSettings) and stage.precision == "bf16":
                stage.precision = "fp32"
    return settings


def _with_full_names(values: Any) -> dict[str, Any]:
    """The settings with the short names in the sections `train_*` replaced."""
    settings: Any = OmegaConf.to_container(values)
    for key, section in settings.items():
        if key.startswith(TRAIN) and isinstance(section, Mapping):
            settings[key] = {STAGE_SETTING_NAMES.get(name, name): section[name] for name in section}
    return settings


def _settings_type(name: str, defaults: Mapping[str, Any]) -> type[Any]:
    """The dataclass of which `defaults` is an instance; `train_*` are `StageSettings`, numbers are
    not negative."""
    # The default of a key determines the type of its field.
    fields: list[Any] = []
    for key, value in defaults.items():
        kind: Any = type(value)
        default: Any = value
        if key.startswith(TRAIN):
            kind = StageSettings
            default = field(default_factory=partial(StageSettings, **value))
        elif isinstance(value, Mapping):
            kind = _settings_type(f"{name}.{key}", value)
            default = field(default_factory=kind)
        elif isinstance(value, list):
            kind = list[int]
            default = setting(factory=partial(list, value), minimum=1)
        elif value is None:
            kind = bool | None
        elif not isinstance(value, bool | str):
            default = setting(value, minimum=0)
        fields.append((key, kind, default))
    return make_dataclass(name, fields)


def codebook_sections(config: Settings) -> int:
    """Parts of the codebook of nano's tokenizer: one for each code of an image, or one for all."""
    return config.quantizer.queries if config.tokenizer.sections else 1


def has_bf16(device: torch.device) -> bool:
    """Whether the hardware supports bf16 products; a CPU without them is ten times slower than in
    fp32."""
    return device.type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def resolve_path(path: str) -> Path:
    """A path of the settings: as it is, or in the repository."""
    return Path(path) if Path(path).exists() else ROOT / path


# ---- folders


class Workspace:
    """A run of nano: settings, folder of checkpoints, caches and logs, folder of the finished
    system."""

    system = "nano"
    tokenizer_name = "seed_tokenizer"
    decoder_name = "seed_tokenizer/diffusion_model"

    def __init__(self, config: Settings, work: Path, out: Path) -> None:
        self.config = config
        self.work = work
        self.out = out
        # Folders of the text tokenizer (and nano's image tokenizer), and of diffusers' networks.
        self.tokenizer_folder = out / self.tokenizer_name
        self.decoder_folder = out / self.decoder_name
        self.device = choose_device(config.device, torch.float32, log=None).device

    @property
    def folders(self) -> dict[str, str]:
        """Absolute paths by the names that commands and templates use."""
        paths = {
            "work": self.work,
            "out": self.out,
            "autoencoder": self.autoencoder.parent,
            "words": self.tokenizer_folder,
            "decoder": self.decoder_folder,
            "judge": resolve_path(self.config.judge),
        }
        return {name: str(path.absolute()) for name, path in paths.items()}

    @property
    def autoencoder(self) -> Path:
        """The folder of the autoencoder whose latents are drawn."""
        return self.work / "autoencoder" / "vae"

    def record(self, stage: str) -> Path:
        """The record of a finished stage; those of the applications lie in folders of their own."""
        candidates = (self.work / stage / f"{stage}.done.json", self.work / stage / "summary.json")
        return next(filter(Path.is_file, candidates), self.work / f"{stage}.done.json")

    @property
    def names(self) -> Sequence[str]:
        """The things of the language model's records."""
        return first_things(getattr(self.config, "things", None))

    @cached_property
    def pool(self) -> list[Scene]:
        """The first training scenes, of which latents, embeddings and codes are cached."""
        return [scene_at(self.config.seed, index) for index in range(self.config.pool)]

    def cached(self, name: str, stage: str, make: Callable[[], Tensor], **facts: object) -> Tensor:
        """The tensor `work/NAME.safetensors`; computed by `make` if it is absent, damaged, older
        than the record of `stage`, or of other settings (`facts`, and those of the pool)."""
        file = self.work / f"{name}.safetensors"
        record = self.record(stage)
        config = self.config
        facts = {
            "seed": config.seed,
            "pool": config.pool,
            "image_size": config.image_size,
            "start": getattr(config, "start", ""),
            **facts,
        }
        if file.is_file() and (
            not record.is_file() or record.stat().st_mtime_ns <= file.stat().st_mtime_ns
        ):
            with suppress(SafetensorError, KeyError), safe_open(file, framework="pt") as handle:
                if json.loads((handle.metadata() or {}).get("facts", "{}")) == facts:
                    return handle.get_tensor("value")  # type: ignore[no-any-return]
        value = make()
        save_state_dict({"value": value}, file, {"facts": json.dumps(facts)})
        return value


class SuccessorWorkspace(Workspace):
    """A run of a system that is built on a finished nano."""

    @property
    def nano(self) -> Path:
        """The tokenizer folder of the finished nano."""
        folder = resolve_path(self.config.start) / Workspace.tokenizer_name
        if not (folder / "diffusion_model" / "vae" / "config.json").is_file():
            raise CheckpointError(
                f"{self.config.start}: start must be the folder of a finished nano, whose vision "
                "encoder and autoencoder are used: bash scripts/nano_speedrun.sh trains one."
            )
        return folder

    @property
    def autoencoder(self) -> Path:
        return self.nano / "diffusion_model" / "vae"


class XWorkspace(SuccessorWorkspace):
    """A run of nano-x; its pool holds both images of edits."""

    system = "nano_x"
    tokenizer_name = "tokenizer"
    decoder_name = "sdxl"

    @cached_property
    def edits(self) -> list[tuple[Scene, Scene]]:
        """Scenes before and after an edit."""
        pairs = []
        for index in range(self.config.pool):
            request, answer = from_last_image(record_at("edits", self.config.seed, index))
            pairs.append((request["content"][0], answer["content"][1]))
        return pairs

    @cached_property
    def pool(self) -> list[Scene]:
        """Both scenes of every edit."""
        return [scene for pair in self.edits for scene in pair]


class LavitWorkspace(SuccessorWorkspace):
    """A run of nano-lavit."""

    system = "nano_lavit"
    tokenizer_name = "words"
    decoder_name = "pixels"

    @property
    def encoder_sizes(self) -> EvaConfig:
        """Of the vision encoder, which is nano's."""
        vit = Seed2Tokenizer.read_config(self.nano / "config.json").vit
        assert isinstance(vit, EvaConfig)
        return vit
