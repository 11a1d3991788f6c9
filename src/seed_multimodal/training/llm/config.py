"""Settings of a language model's run: model, trainer and prompt template.

A model's YAML is ours or an original one (`compat.part_files`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from seed_multimodal.config import from_compat, project_path
from seed_multimodal.device import DTYPES
from seed_multimodal.disk import read_json_object
from seed_multimodal.errors import ConfigError
from seed_multimodal.language.llm import BITSANDBYTES
from seed_multimodal.language.prompts import TUNED_TEMPLATES, template_for
from seed_multimodal.settings import check_settings, non_negative, positive, read_settings, setting
from seed_multimodal.training.config import ConfigNode, RunTrainerSettings

ATTENTIONS = {
    "auto": "auto",
    "sdpa": "sdpa",
    "eager": "eager",
    "flex": "flex_attention",
    "flash": "flash_attention_2",
}


@dataclass
class LlmModelSettings:
    """A LLaMA and how it is trained. `dtype`: of frozen weights, by default the run's precision, so
    that original fp16 weights stay exact in fp16 runs; trained weights are kept in fp32."""

    path: str | None = None  # folder of the base model, or
    # a `LlamaConfig` for random weights, with the tokenizer's vocabulary
    sizes: dict[str, Any] | None = None
    dtype: str | None = setting(None, choices=tuple(DTYPES))
    # of the frozen base (QLoRA)
    quantization: str | None = setting(None, choices=(None, *BITSANDBYTES))
    # auto: packed rows on CUDA by flash if installed, else by flex; padded rows and elsewhere by
    # sdpa
    attention: str = setting("auto", choices=tuple(ATTENTIONS))
    lora: dict[str, Any] | None = None  # fields of `peft.LoraConfig`; None trains every weight
    # train embeddings and head with the LoRA, not as copies (SEED-X)
    train_embeddings: bool = False
    # of full training: all weights but the input embeddings are trained
    freeze_embeddings: bool = False
    # Rows of new tokens. normal: N(0, initializer_range); mean: the old rows' mean, 3 times it in
    # the head (SEED-X)
    embedding_init: str = setting("normal", choices=("normal", "mean"))
    adapter: str | None = None  # folder of a trained adapter (or weights) to start from
    seed: int = 0  # of new weights: random initialization, new token embeddings, LoRA
    # None: by the model's width, as at inference
    template: str | None = setting(None, choices=TUNED_TEMPLATES)
    gradient_checkpointing: bool = False
    compile: bool = False  # torch.compile of each layer

    def __post_init__(self) -> None:
        """Raise ConfigError: a limit, or settings that contradict each other."""
        check_settings(self, "model")
        if (self.path is None) == (self.sizes is None):
            raise ConfigError(
                "model: set either path (the folder of a LLaMA) or sizes (for random weights)."
            )
        has_adapter = self.lora is not None or self.adapter is not None
        if self.quantization is not None and self.path is None:
            raise ConfigError(
                "model: quantization needs a trained base (path), not random weights."
            )
        if self.quantization is not None and not has_adapter:
            raise ConfigError(f"model: a {self.quantization} base cannot be trained; set lora.")
        if self.train_embeddings and not has_adapter:
            raise ConfigError("model: train_embeddings is for lora; without it all weights train.")
        if self.freeze_embeddings and self.lora is not None:
            raise ConfigError(
                "model: freeze_embeddings is for full training; with lora, leave embed_tokens out "
                "of lora.modules_to_save."
            )


@dataclass(kw_only=True)
class LlmTrainerSettings(RunTrainerSettings):
    """Settings of a language model's training."""

    # tokens: mean over all learned tokens of a step (default for packed data); batch: mean of the
    # micro-batches' means, as in the original
    loss_average: str | None = setting(None, choices=("tokens", "batch"))
    text_weight: float = non_negative(1.0)
    image_weight: float = non_negative(1.0)
    eval_steps: int = non_negative(0)  # 0 never evaluates
    eval_batches: int = positive(16)  # evaluation micro-batches per process
    # of one device, for the MFU; None: by device name
    peak_tflops: float | None = setting(None, above=0)
    gradient_checkpointing: bool | None = None  # overrides the model's, as `compile`
    compile: bool | None = None


@dataclass
class TokenizerSettings:
    """The tokenizer's folder."""

    pretrained_model_name_or_path: str

    @property
    def folder(self) -> Path:
        return project_path(self.pretrained_model_name_or_path)


def read_tokenizer(config: ConfigNode, label: str) -> TokenizerSettings:
    """Settings from a mapping, ours or the original's. Raises ConfigError: no folder is set."""
    fields = TokenizerSettings.__dataclass_fields__
    values = {key: value for key, value in config.items() if key in fields and value}
    return read_settings(TokenizerSettings, values, label)


def read_model_settings(config: ConfigNode, label: str = "model") -> LlmModelSettings:
    """Settings from a mapping: ours, or the original's with its `_target_`. Raises ConfigError."""
    # An original file may be extended by our keys, which win.
    ours: dict[str, Any] = {}
    original: dict[str, Any] = {}
    for key, value in config.items():
        group = ours if key in LlmModelSettings.__dataclass_fields__ else original
        group[str(key)] = value
    if "_target_" in original:
        original = from_compat("part_files:model_keys")(original, label)
    return read_settings(LlmModelSettings, {**original, **ours}, label)


def adapt_to_run(
    model: LlmModelSettings, trainer: LlmTrainerSettings, deepspeed: bool
) -> LlmModelSettings:
    """The settings adapted to trainer and engine.

    Raises ConfigError: a quantized base with DeepSpeed.
    """
    if deepspeed and model.quantization is not None:
        raise ConfigError("DeepSpeed does not support a quantized base; use the plain engine.")
    # Without autocast (fp32) all weights must have one dtype.
    dtype = "fp32" if trainer.precision == "fp32" else model.dtype or trainer.precision
    adapted = replace(model, dtype=dtype)
    if trainer.gradient_checkpointing is not None:
        adapted.gradient_checkpointing = trainer.gradient_checkpointing
    if trainer.compile is not None:
        adapted.compile = trainer.compile
    return adapted


def template_of(model: LlmModelSettings, tokenizer: Path | None) -> str:
    """The prompt template of a model: configured, else as at inference that of a hub tokenizer, or
    by the model's width."""
    if model.template:
        return model.template
    sizes = model.sizes or {}
    config = project_path(str(model.path)) / "config.json"
    if model.path is not None and config.is_file():
        sizes = read_json_object(config, ConfigError)
    return template_for(sizes.get("hidden_size"), tokenizer)
