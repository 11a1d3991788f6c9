"""Settings of a training by rewards."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from seed_multimodal.errors import ConfigError
from seed_multimodal.settings import check_settings, non_negative, positive, setting
from seed_multimodal.training.config import RunTrainerSettings
from seed_multimodal.training.hydra_task import RunSettings
from seed_multimodal.training.meters import Meter

# Numbers of the log beside the rewards.
LOGGED = (*Meter.reserved, "kl", "drift", "flat_groups", "bad_samples")


@dataclass
class RlModelSettings:
    """The trained system.

    Attributes:
        system: name or folder of a system whose images are codes.
        lora: fields of `peft.LoraConfig`, without dropout; none: all weights are trained.
        seed: of the LoRA's matrices.
    """

    system: str
    lora: dict[str, Any] | None = None
    seed: int = 0


@dataclass
class RewardSettings:
    """A reward.

    Attributes:
        name: `geneval`, `judge`, `clip`, or one that another package registers.
        model: folder or name of its detector, image-text model or CLIP.
        weight: factor of its values in the sum of all rewards.
        options: further arguments of what opens it.
    """

    name: str
    model: str = ""
    weight: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class RlDataSettings:
    """Prompts, and how they are answered.

    Attributes:
        prompts: JSON lines with `prompt`, and what the rewards read (GenEval's metadata).
        eval_prompts: of the evaluation, which draws one image each.
        batch_size: prompts of a micro-step in each process.
        group_size: answers to each prompt.
        temperature: of the answers.
        rewarded_codes: so many first codes of an image are drawn and trained; none: all.
        drawing: settings of the de-tokenizer.
    """

    prompts: str
    rewards: list[RewardSettings]
    eval_prompts: str | None = None
    batch_size: int = positive(12)
    group_size: int = setting(8, minimum=2)
    temperature: float = setting(1.0, above=0)
    rewarded_codes: int | None = positive(None)
    drawing: dict[str, Any] = field(default_factory=dict)
    seed: int = non_negative(0)

    def __post_init__(self) -> None:
        """Raise ConfigError: a limit, no reward, or two of one name."""
        check_settings(self, "data")
        if not self.rewards:
            raise ConfigError("data: rewards is empty; name one, such as {name: geneval, ...}.")
        names = list(LOGGED)
        for name in ("reward", *[reward.name for reward in self.rewards]):
            names += [name, f"{name}_std"]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(
                    "data: rewards: each needs names of its own, since a log has one number for "
                    f"NAME and one for NAME_std of each; {name} is taken twice."
                )


@dataclass(kw_only=True)
class RlTrainerSettings(RunTrainerSettings):
    """Settings of the steps.

    Attributes:
        spread: advantages are divided by the standard deviation of their group.
        kl_weight: of the distance from the start's distribution.
        eval_steps: steps between evaluations (0: none).
    """

    precision: str = setting("fp32", choices=("bf16", "fp32"))
    spread: bool = True
    kl_weight: float = non_negative(0.0)
    eval_steps: int = non_negative(0)


@dataclass(kw_only=True)
class RlRunSettings(RunSettings):
    """Settings of a run."""

    model: RlModelSettings
    data: RlDataSettings
    trainer: RlTrainerSettings
