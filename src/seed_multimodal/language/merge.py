"""Base + adapter → a plain LLaMA folder, one tensor at a time, checked by its logits.

What: every linear layer becomes W + scale · B · A (computed in fp32), every module trained whole takes the place of
the base's, embeddings get the tokenizer's words, special ids are set right, the tokenizer's files go along. The result
is what transformers, vLLM and this package's inference load. A fully trained checkpoint passes through unchanged.
Peculiar: weights stream from the base's shards into new ones, so memory holds the largest tensor a few times, never a
model (the comparison of logits at the end does need room for one model: `verify=False` goes without). The folder
appears by one rename, complete or not at all. A base with tied embeddings stays tied if both ends are still the same.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seed_multimodal.device import DTYPES
from seed_multimodal.disk import replace_folder
from seed_multimodal.errors import CheckpointError, ConfigError, first_line
from seed_multimodal.language.adapters import ADAPTER_CONFIG, TrainedTensors
from seed_multimodal.language.llama import BOS, EOS, PAD
from seed_multimodal.language.merge_check import compare_logits
from seed_multimodal.language.shards import CODES, Shards, TensorEntry, parse_size, tensor_bytes, write_shards

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Log = Callable[[str], None] | None


@dataclass
class MergeReport:
    """What a merge did; `difference` is the relative one of logits before and after (None: not compared)."""

    folder: Path
    files: list[Path] = field(default_factory=list)
    merged: int = 0
    replaced: int = 0
    tensors: int = 0
    words: int = 0
    difference: float | None = None

    def __str__(self) -> str:
        checked = ("logits not compared" if self.difference is None else
                   f"logits as before (relative difference {self.difference:.1e})")
        nothing = "" if self.merged or self.replaced else (
            " There was nothing to merge (a whole model, no adapter): it was copied as it is.")
        return (f"{self.folder}: {self.tensors} tensors in {len(self.files)} file{'s' * (len(self.files) != 1)}, "
                f"{self.merged} with LoRA merged in, {self.replaced} replaced by trained ones, "
                f"{self.words} words; {checked}.{nothing}")


@dataclass
class _Plan:
    """Names, shapes and precisions of the result, and where its values come from."""

    config: Any
    base: Shards
    trained: TrainedTensors | None
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]

    def value(self, name: str) -> Tensor:
        """One tensor of the result."""
        if self.trained is not None and name in self.trained.whole:
            value = self.trained.read(self.trained.whole[name])
        else:
            value = self.base.read(EMBEDDING if name == HEAD and HEAD not in self.base.entries else name)
        if self.trained is None or name not in self.trained.low:
            return value
        pair = self.trained.low[name]
        product = self.trained.read(pair.b).float() @ self.trained.read(pair.a).float()
        return product.mul_(self.trained.scale).add_(value)


def merge_adapter(
    base: str | Path | None, trained: str | Path | None, out: str | Path, *, tokenizer: Any = None,
    lora: Mapping[str, Any] | None = None, dtype: str = "fp32", max_shard_size: str | int = "5GB",
    verify: bool = True, force: bool = False, log: Log = None,
) -> MergeReport:
    """Write a plain LLaMA folder.

    Args:
        base: LLaMA folder (safetensors or old .bin shards); None if `trained` is a whole model.
        trained: folder of an adapter, a whole trained model, or a file or folder written by `zero_to_fp32.py`.
        tokenizer: `MultimodalTokenizer`; its words must be the result's, and its files are written beside the weights.
        lora: r and lora_alpha where no `adapter_config.json` says them.
        dtype: fp32 (as released), bf16, fp16, or base (each tensor as the base has it).
        max_shard_size: bytes, or `5GB`, `500MiB`, …
        verify: compare logits of base and adapter through peft with the result's.
        force: replace a folder that is not empty.

    Raises:
        CheckpointError: missing, damaged or foreign tensors, an adapter of another width, another vocabulary, logits
            that differ, no room on the disk.
        ConfigError: an unknown precision or size, an `out` that is not empty, or one that holds what is read.
    """
    place, largest = Path(out), parse_size(max_shard_size)
    target = place.resolve() if place.is_symlink() or not place.name else place
    if dtype not in (*DTYPES, "base"):
        raise ConfigError(f"Unknown precision {dtype!r}: use fp32, bf16, fp16 or base.")
    if target.is_file():
        raise ConfigError(f"{target}: is a file; the merged model needs a folder.")
    if target.is_dir() and any(target.iterdir()) and not force:
        raise ConfigError(f"{target}: exists already and is not empty (--force replaces it).")
    if any(one is not None and Path(one).resolve().is_relative_to(target.resolve()) for one in (base, trained)):
        raise ConfigError(f"{target}: holds what is to be merged, which would be gone; choose another folder.")
    plan = _plan(base, trained, tokenizer, lora, dtype)
    _check_room(target, plan)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    report = MergeReport(target, tensors=len(plan.shapes), words=int(plan.config.vocab_size))
    if plan.trained is not None:
        report.merged = sum(name in plan.shapes for name in plan.trained.low)
        report.replaced = sum(name in plan.shapes for name in plan.trained.whole)
    try:
        temporary.mkdir(parents=True)
        files = write_shards(temporary, plan.shapes, plan.dtypes, plan.value, largest, log)
        _write_settings(temporary, plan, tokenizer)
        if verify:
            report.difference = _verify(plan, base, temporary, log)
        replace_folder(temporary, target)
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written ({error.strerror or error}).") from error
    finally:
        plan.base.close()
        shutil.rmtree(temporary, ignore_errors=True)
    report.files = [target / file.name for file in files]
    return report


def _plan(base: str | Path | None, trained: str | Path | None, tokenizer: Any, lora: Mapping[str, Any] | None,
          dtype: str) -> _Plan:
    whole = trained is not None and (Path(trained) / "config.json").is_file() and not (
        Path(trained) / ADAPTER_CONFIG).is_file()
    if whole:
        base, trained = trained, None
    if base is None:
        raise ConfigError("A base model is needed: the LLaMA folder that the adapter was trained on.")
    values = _read_config(Path(base))
    shards, adapter = Shards(base), TrainedTensors(trained, lora) if trained is not None else None
    rows = _words(values, shards, adapter, tokenizer)
    values.update(vocab_size=rows, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, use_cache=True)
    values["tie_word_embeddings"] = bool(values.get("tie_word_embeddings")) and _still_tied(adapter)
    for stale in ("torch_dtype", "dtype", "max_sequence_length", "_name_or_path", "quantization_config"):
        values.pop(stale, None)
    config = _llama_config(values, Path(base))
    shapes = _shapes(config)
    plan = _Plan(config, shards, adapter, shapes, {})
    for name in shapes:
        own = _source(plan, name).dtype
        plan.dtypes[name] = DTYPES[dtype] if dtype != "base" else own if own in CODES else torch.float32
    _check_shapes(plan)
    config.dtype = plan.dtypes["model.norm.weight"] if dtype == "base" else DTYPES[dtype]
    return plan


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{folder}: there is no config.json in it, so this is not a language model's folder.")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file}: not valid json ({error}).") from error
    if not isinstance(values, dict) or values.get("model_type") != "llama":
        raise CheckpointError(f"{file}: a checkpoint of another model: model_type is not 'llama'.")
    return values


def _llama_config(values: dict[str, Any], folder: Path) -> Any:
    from transformers import LlamaConfig

    try:
        config = LlamaConfig.from_dict(values)
    except (TypeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: {first_line(error)}") from error
    config.architectures = ["LlamaForCausalLM"]
    return config


def _shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a stock LLaMA's tensors; tied embeddings stand once."""
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        state = LlamaForCausalLM(config).state_dict()
    if config.tie_word_embeddings:
        state.pop(HEAD, None)
    return {name: tuple(value.shape) for name, value in state.items()}


def _words(values: Mapping[str, Any], base: Shards, trained: TrainedTensors | None, tokenizer: Any) -> int:
    """How many words the result has; all sources must agree on it."""
    rows = base.entries[EMBEDDING].shape[0] if EMBEDDING in base.entries else int(values.get("vocab_size", 0))
    where = str(base.source)
    for name in (EMBEDDING, HEAD):
        if trained is not None and name in trained.whole:
            rows, where = trained.shape(trained.whole[name])[0], str(trained.source)
    if tokenizer is not None and rows != tokenizer.vocabulary.size:
        raise CheckpointError(f"{where}: has {rows} words, but the tokenizer has {tokenizer.vocabulary.size}; they do "
                              f"not belong together.")
    return rows


def _still_tied(trained: TrainedTensors | None) -> bool:
    """Whether one matrix can still serve as both embeddings."""
    if trained is None:
        return True
    if EMBEDDING in trained.low or HEAD in trained.low:
        return False
    if HEAD not in trained.whole:
        return True
    return EMBEDDING in trained.whole and torch.equal(
        trained.read(trained.whole[EMBEDDING]), trained.read(trained.whole[HEAD]))


def _source(plan: _Plan, name: str) -> TensorEntry:
    """Where the whole tensor of this name comes from."""
    if plan.trained is not None and name in plan.trained.whole:
        return plan.trained.shards.entries[plan.trained.whole[name]]
    found = plan.base.entries.get(name) or (plan.base.entries.get(EMBEDDING) if name == HEAD else None)
    if found is None:
        raise CheckpointError(f"{plan.base.source}: the tensor {name!r} is missing from it.")
    return found


def _check_shapes(plan: _Plan) -> None:
    for name, shape in plan.shapes.items():
        found = _source(plan, name)
        if found.shape != shape:
            raise CheckpointError(f"{found.file}: {name!r} is {found.shape}, but the model needs {shape}.")
    trained = plan.trained
    if trained is None:
        return
    for name in (*trained.low, *trained.whole):
        if name not in plan.shapes and not (name == HEAD and plan.config.tie_word_embeddings):
            raise CheckpointError(f"{trained.source}: {name!r} belongs to no tensor of {plan.base.source}.")
    for name, pair in trained.low.items():
        product = (trained.shape(pair.b)[0], trained.shape(pair.a)[1])
        if product != plan.shapes[name]:
            raise CheckpointError(f"{trained.source}: an adapter for another model: {name!r} is {plan.shapes[name]} in "
                                  f"the base, but lora_B · lora_A is {product}.")


def _check_room(target: Path, plan: _Plan) -> None:
    needed = sum(tensor_bytes(shape, plan.dtypes[name]) for name, shape in plan.shapes.items())
    free = shutil.disk_usage(next((p for p in (target, *target.parents) if p.is_dir()), Path())).free
    if needed > free:
        raise CheckpointError(f"{target}: needs {needed / 1e9:.1f} GB, but the disk has {free / 1e9:.1f} GB left.")


def _write_settings(folder: Path, plan: _Plan, tokenizer: Any) -> None:
    from transformers import GenerationConfig

    plan.config.save_pretrained(folder)
    GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _verify(plan: _Plan, base: str | Path | None, folder: Path, log: Log) -> float:
    """Relative difference of the logits, or of the tensors where a whole model passed through."""
    if log is not None:
        log("comparing with what went in")
    if plan.trained is not None and base is not None and (plan.trained.low or plan.trained.config):
        return compare_logits(Path(base), plan.trained, folder)
    written = Shards(folder)
    for name in plan.shapes:
        if not torch.equal(written.read(name), plan.value(name).to(plan.dtypes[name])):
            raise CheckpointError(f"{folder}: {name!r} was not written as it was read.")
    written.close()
    return 0.0
