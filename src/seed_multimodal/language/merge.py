"""Base + adapter → a plain LLaMA folder, one tensor at a time, checked by its logits.

Every linear layer becomes W + scale · B · A (computed in fp32), every module trained whole takes the place of the
base's, embeddings get the tokenizer's words, special ids are set right, the tokenizer's files go along. The result is
what transformers, vLLM and this package's inference load. A fully trained checkpoint passes through unchanged.

Weights stream from the base's shards into new ones, so memory holds the largest tensor a few times, never a model (the
comparison of logits at the end does need room for one model: `verify=False` goes without). The folder appears by one
rename, complete or not at all. A base with tied embeddings stays tied if both ends are still the same.

Of a tuned SEED-X the folder holds `llm` and `agent`, its resamplers under their released names.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seed_multimodal.device import DTYPES
from seed_multimodal.disk import making_folder, output_folder, read_json_object
from seed_multimodal.errors import CheckpointError, ConfigError, counted, first_line
from seed_multimodal.language.adapters import ADAPTER_CONFIG, TrainedTensors
from seed_multimodal.language.llama import BOS, EOS, PAD, ROTARY, plain_generation
from seed_multimodal.language.merge_check import compare_logits
from seed_multimodal.language.shards import CODES, Shards, TensorEntry, parse_size, write_shards
from seed_multimodal.weights import save_state_dict, warn_tensors

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LLM_FOLDER, AGENT_FOLDER = "llm", "agent"
VISUAL = "visual_weight.safetensors"  # LaVIT's merger and projector, which go along as they are
AGENT_FILE, AGENT_SIZES = "model.safetensors", "config.json"
Log = Callable[[str], None] | None
AgentSizes = Callable[[TrainedTensors], Mapping[str, Any]]


@dataclass
class MergeReport:
    """Result of a merge; `difference`: relative difference of the logits before and after (None: not compared);
    `beside`: tensors of an agent's resamplers."""

    folder: Path
    files: list[Path] = field(default_factory=list)
    merged: int = 0
    replaced: int = 0
    tensors: int = 0
    words: int = 0
    difference: float | None = None
    beside: int = 0

    def __str__(self) -> str:
        checked = ("logits not compared" if self.difference is None else
                   f"logits as before (relative difference {self.difference:.1e})")
        nothing = "" if self.merged or self.replaced else (
            " There was nothing to merge (a whole model, no adapter): it was copied as it is.")
        beside = f" {self.beside} tensors of the resamplers beside it, in {AGENT_FOLDER}." if self.beside else ""
        return (f"{self.folder}: {self.tensors} tensors in {counted(len(self.files), 'file')}, "
                f"{self.merged} with LoRA merged in, {self.replaced} replaced by trained ones, "
                f"{self.words} words; {checked}.{beside}{nothing}")


@dataclass
class _Plan:
    """Tensors of the result (`tensors`: shape and precision, on the meta device), and where their values come from."""

    config: Any
    base: Shards
    trained: TrainedTensors | None
    tensors: dict[str, Tensor]

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
    verify: bool = True, force: bool = False, agent: AgentSizes | None = None, log: Log = None,
) -> MergeReport:
    """Write a plain LLaMA folder; of a SEED-X agent two, see above.

    Args:
        base: LLaMA folder (safetensors or old .bin shards); None if `trained` is a whole model.
        trained: folder of an adapter, a whole trained model, a checkpoint of SEED-X's tuning, or a file or folder
            written by `zero_to_fp32.py`.
        tokenizer: `MultimodalTokenizer`; its words must be the result's, and its files are written beside the weights.
        lora: r and lora_alpha where there is no `adapter_config.json`.
        dtype: fp32 (as released), bf16, fp16, or base (each tensor as the base has it).
        max_shard_size: bytes, or `5GB`, `500MiB`, …
        verify: compare logits of base and adapter through peft with the result's.
        force: replace a folder that is not empty.
        agent: gives, of a SEED-X agent, the content of `agent/config.json`: sizes of the resamplers.

    Raises:
        CheckpointError: missing, damaged or foreign tensors, an adapter of another width, another vocabulary, logits
            that differ, no room on the disk.
        ConfigError: an unknown precision or size, an `out` that is not empty, or one that holds what is read.
    """
    largest = parse_size(max_shard_size)
    if dtype not in (*DTYPES, "base"):
        raise ConfigError(f"Unknown precision {dtype!r}: use fp32, bf16, fp16 or base.")
    target = output_folder(out, force=force, what="the merged model", read=(base, trained),
                           called="what is to be merged")
    plan = _plan(base, trained, tokenizer, lora, dtype)
    _check_room(target, plan, out)
    sizes: Mapping[str, Any] | None = None
    report = MergeReport(Path(out), tensors=len(plan.tensors), words=int(plan.config.vocab_size))
    if plan.trained is not None:
        report.merged = sum(name in plan.tensors for name in plan.trained.low)
        report.replaced = sum(name in plan.tensors for name in plan.trained.whole)
        report.beside = len(plan.trained.beside)
        sizes = agent(plan.trained) if agent is not None and report.beside else None
    try:
        with making_folder(target, out) as folder:
            inner = folder / LLM_FOLDER if report.beside else folder
            inner.mkdir(exist_ok=True)
            files = write_shards(inner, plan.tensors, plan.value, largest, log)
            _write_settings(inner, plan, tokenizer)
            visual = Path(trained or base or "") / VISUAL
            if visual.is_file():
                shutil.copyfile(visual, inner / VISUAL)
            if report.beside and plan.trained is not None:
                _write_agent(folder / AGENT_FOLDER, plan.trained, sizes)
            if verify:
                report.difference = _verify(plan, base, inner, log)
    finally:
        plan.base.close()
    report.files = [target / file.relative_to(folder) for file in files]
    return report


def _plan(base: str | Path | None, trained: str | Path | None, tokenizer: Any, lora: Mapping[str, Any] | None,
          dtype: str) -> _Plan:
    whole = trained is not None and (Path(trained) / "config.json").is_file() and not (
        Path(trained) / ADAPTER_CONFIG).is_file()
    if whole:
        base, trained = trained, None
    adapter = TrainedTensors(trained, lora) if trained is not None else None
    if base is None and adapter is not None and adapter.agent.get("llm"):  # trained whole, and says what it is
        config_file, values, shards = adapter.source, dict(adapter.agent["llm"]), adapter.shards
    else:
        config_file, values, shards = _base(base)
    rows = _words(values, shards, adapter, tokenizer)
    values.update(vocab_size=rows, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, use_cache=True)
    values["tie_word_embeddings"] = bool(values.get("tie_word_embeddings")) and _still_tied(adapter)
    for stale in ("torch_dtype", "dtype", "max_sequence_length", "_name_or_path", "quantization_config"):
        values.pop(stale, None)
    config, tensors = _llama(values, config_file)
    if adapter is None or shards is not adapter.shards:
        warn_tensors((name for name in shards.entries if name not in tensors), (ROTARY, HEAD), shards.source)
    plan = _Plan(config, shards, adapter, tensors)
    for name, tensor in tensors.items():
        own = _source(plan, name).dtype
        tensors[name] = tensor.to(DTYPES[dtype] if dtype != "base" else own if own in CODES else torch.float32)
    _check_shapes(plan)
    config.dtype = tensors["model.norm.weight"].dtype if dtype == "base" else DTYPES[dtype]
    return plan


def _base(base: str | Path | None) -> tuple[Path, dict[str, Any], Shards]:
    """The base's configuration file, its content, and its tensors."""
    if base is None:
        raise ConfigError("A base model is needed: the LLaMA folder that the adapter was trained on.")
    file = Path(base) / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{base}: there is no config.json in it, so this is not a language model's folder.")
    values = read_json_object(file)
    if values.get("model_type") != "llama":
        raise CheckpointError(f"{file}: a checkpoint of another model: model_type is not 'llama'.")
    return file, values, Shards(base)


def _llama(values: dict[str, Any], file: Path) -> tuple[Any, dict[str, Tensor]]:
    """The configuration, and a stock LLaMA's tensors on the meta device; tied embeddings stand once."""
    from transformers import LlamaConfig, LlamaForCausalLM

    try:
        config = LlamaConfig.from_dict(values)
    except (TypeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{file}: {first_line(error)}") from error
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        state = LlamaForCausalLM(config).state_dict()
    if config.tie_word_embeddings:
        state.pop(HEAD, None)
    return config, dict(state)


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
    shapes = {name: tuple(tensor.shape) for name, tensor in plan.tensors.items()}
    for name, shape in shapes.items():
        found = _source(plan, name)
        if found.shape != shape:
            raise CheckpointError(f"{found.file}: {name!r} is {found.shape}, but the model needs {shape}.")
    trained = plan.trained
    if trained is None:
        return
    for name in (*trained.low, *trained.whole):
        if name not in shapes and not (name == HEAD and plan.config.tie_word_embeddings):
            raise CheckpointError(f"{trained.source}: {name!r} belongs to no tensor of {plan.base.source}.")
    for name, pair in trained.low.items():
        product = (trained.shape(pair.b)[0], trained.shape(pair.a)[1])
        if product != shapes[name]:
            raise CheckpointError(f"{trained.source}: an adapter for another model: {name!r} is {shapes[name]} in "
                                  f"the base, but lora_B · lora_A is {product}.")


def _check_room(target: Path, plan: _Plan, shown: str | Path) -> None:
    needed = sum(tensor.nbytes for tensor in plan.tensors.values())
    if plan.trained is not None:
        needed += sum(4 * math.prod(plan.trained.shape(name)) for name in plan.trained.beside.values())
    free = shutil.disk_usage(next((p for p in (target, *target.parents) if p.is_dir()), Path())).free
    if needed > free:
        raise CheckpointError(f"{shown}: needs {needed / 1e9:.1f} GB, but the disk has {free / 1e9:.1f} GB left.")


def _write_settings(folder: Path, plan: _Plan, tokenizer: Any) -> None:
    plan.config.save_pretrained(folder)
    plain_generation().save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _write_agent(folder: Path, trained: TrainedTensors, sizes: Mapping[str, Any] | None) -> None:
    """An agent's own tensors, as they are."""
    folder.mkdir()
    save_state_dict({name: trained.read(there).clone() for name, there in trained.beside.items()}, folder / AGENT_FILE)
    if sizes is not None:
        (folder / AGENT_SIZES).write_text(json.dumps(sizes, indent=1), encoding="utf-8")


def _verify(plan: _Plan, base: str | Path | None, folder: Path, log: Log) -> float:
    """Relative difference of the logits, or of the tensors where a whole model passed through."""
    if log is not None:
        log("comparing with the inputs")
    if plan.trained is not None and base is not None and (plan.trained.low or plan.trained.config):
        return compare_logits(Path(base), plan.trained, folder)
    written = Shards(folder)
    for name, tensor in plan.tensors.items():
        if not torch.equal(written.read(name), plan.value(name).to(tensor.dtype)):
            raise CheckpointError(f"{folder}: {name!r} was not written as it was read.")
    written.close()
    return 0.0
