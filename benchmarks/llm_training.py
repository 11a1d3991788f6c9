"""Time the language model's training, lever by lever: useful tokens/s, model-FLOP utilisation, peak memory. JSON lines.

    python benchmarks/llm_training.py                                       # nano sizes
    python benchmarks/llm_training.py --size 7b --device cuda --dtype bf16 --peak-tflops measured      # random weights
    python benchmarks/llm_training.py --levers original,packed,liger        # only some, in this order

The model is trained as released: LoRA on the linear layers, embeddings, head and norms trained whole. `original` is
what the original runs: caption micro-batches padded to 200 tokens, transformers' loss over all positions, every
activation made again. Each further lever differs from the one before it by its row in LEVERS. Lines carry the ratio of
useful tokens/s (no padding) to the first setting of the same run.
The fp8 levers come last: the one model of the run loses its bf16 base for good. Their utilisation is of the same peak
as all others', so it shows their speed-up, not how well FP8 is used.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from shared import (
    common_flags,
    failure,
    forget,
    measure,
    peak_tflops,
    positive,
    print_line,
    refuse_unknown,
    rounded,
    runtime_of,
    utilisation,
)
from torch import Tensor

from seed_multimodal.data.stream.llm_batches import LlmBatch
from seed_multimodal.data.stream.packing import best_fit, make_row
from seed_multimodal.language.vocabulary import ImageVocabulary
from seed_multimodal.training.llm.flops import step_flops
from seed_multimodal.training.llm.fp8 import freeze_in_fp8, has_fp8
from seed_multimodal.training.llm.loss import find_llama, packed_loss
from seed_multimodal.training.llm.model import build_llm, set_attention, set_checkpointing
from seed_multimodal.training.llm.model_settings import LlmModelSettings
from seed_multimodal.training.optimizers import OptimSettings, build_optimizer

SIZES: dict[str, dict[str, Any]] = {
    "nano": {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 4, "num_attention_heads": 8,
             "max_position_embeddings": 512},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
           "max_position_embeddings": 2048},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
            "max_position_embeddings": 2048}}
VOCABULARIES = {"nano": ImageVocabulary(2000, 1024, 32), "7b": ImageVocabulary(), "13b": ImageVocabulary()}
# rows x length: of the padded caption batch (released: 116 x 200) and of the packed one
SHAPES = {"nano": ((16, 200), (16, 256)), "7b": ((116, 200), (8, 2048)), "13b": ((116, 200), (4, 2048))}
MOST_WORDS = 40  # text tokens of a caption
LONGEST = 2 + 32 + 2 + MOST_WORDS  # tokens of a caption with its picture: a row must hold one
# Useful tokens/s of plain transformers + peft on one H200 (7B, LoRA as released, bf16, 2026-11-20).
REFERENCES = {"checkpointing_8x2048": 6257, "without_4x2048": 8749, "limit_at_789_tflops": 29200,
              "h100_fp8_anchor": 24824}


@dataclass(frozen=True)
class Lever:
    """One setting; see the module's docstring."""

    packed: bool = True
    attention: str = "sdpa"
    loss: str = "plain"  # transformers: its own, over every position
    checkpointing: bool | str = True
    compile: bool = False
    optimizer: str = "adamw_hf"
    fp8: bool = False


ORIGINAL = Lever(packed=False, loss="transformers")
PACKED = Lever(attention="auto", loss="transformers")
LEARNED = dataclasses.replace(PACKED, loss="plain")
FUSED = dataclasses.replace(LEARNED, optimizer="adamw")
LEVERS = {
    "original": ORIGINAL,
    "packed-sdpa": dataclasses.replace(PACKED, attention="sdpa"),
    "packed": PACKED,
    "learned-head": LEARNED,
    "chunked": dataclasses.replace(LEARNED, loss="chunked"),
    "liger": dataclasses.replace(LEARNED, loss="liger"),
    "fused-optimizer": FUSED,
    "compile": dataclasses.replace(FUSED, compile=True),
    "selective": dataclasses.replace(FUSED, compile=True, checkpointing="selective"),
    "no-checkpointing": dataclasses.replace(FUSED, compile=True, checkpointing=False),
    "no-checkpointing-liger": dataclasses.replace(FUSED, compile=True, checkpointing=False, loss="liger"),
    "fp8-selective": dataclasses.replace(FUSED, compile=True, checkpointing="selective", fp8=True),
    "fp8": dataclasses.replace(FUSED, compile=True, checkpointing=False, fp8=True),
}


def row_length(text: str) -> int:
    """Positions of a packed row, for argparse."""
    if positive(text) < LONGEST:
        raise argparse.ArgumentTypeError(f"{text!r} is less than a picture with its caption can have ({LONGEST})")
    return int(text)


def captions(vocabulary: ImageVocabulary, seed: int = 0) -> Callable[[], np.ndarray]:
    """Draws of `<s>[picture]caption</s>` with 6 to 40 text tokens (COCO's and CC3M's captions have about 12)."""
    generator = np.random.default_rng(seed)

    def draw() -> np.ndarray:
        words = int(np.clip(generator.lognormal(2.5, 0.4), 6, MOST_WORDS))
        text = generator.integers(3, vocabulary.n_text, words)
        codes = generator.integers(vocabulary.n_text, vocabulary.boi_id, vocabulary.tokens_per_image)
        return np.concatenate([[1, vocabulary.boi_id], codes, [vocabulary.eoi_id], text, [2]]).astype(np.int32)

    return draw


def padded_batch(vocabulary: ImageVocabulary, rows: int, length: int) -> LlmBatch:
    """The original's micro-batch: one caption per row, padded on the right."""
    draw = captions(vocabulary)
    ids = np.zeros((rows, length), np.int64)
    labels, mask = np.full_like(ids, -100), np.zeros_like(ids)
    for row in range(rows):
        one = draw()[:length]
        ids[row, :len(one)], labels[row, :len(one)], mask[row, :len(one)] = one, one, 1
    return _batch(ids, labels, np.broadcast_to(np.arange(length), ids.shape), mask, mask.sum(1))


def packed_batch(vocabulary: ImageVocabulary, rows: int, length: int) -> LlmBatch:
    """Captions packed into rows by the training data's own packing."""
    draw, made, waiting, lengths = captions(vocabulary), [], [], []
    for _ in range(rows):
        while sum(map(len, waiting)) < 2 * length:
            waiting.append(draw())
        chosen = best_fit([len(one) for one in waiting], length)
        made.append(make_row([(waiting[i], waiting[i]) for i in chosen], length, 0))
        lengths += [len(waiting[i]) for i in chosen]
        waiting = [one for i, one in enumerate(waiting) if i not in set(chosen)]
    ids, labels, positions = (np.stack([getattr(row, name) for row in made]).astype(np.int64)
                              for name in ("input_ids", "labels", "position_ids"))
    return _batch(ids, labels, positions, None, np.array(lengths))


def _batch(ids: np.ndarray, labels: np.ndarray, positions: np.ndarray, mask: np.ndarray | None,
           lengths: np.ndarray) -> LlmBatch:
    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array))

    return LlmBatch(tensor(ids), tensor(labels), tensor(positions), None if mask is None else tensor(mask),
                    int((ids != 0).sum()), int((labels[:, 1:] != -100).sum()), len(lengths), len(lengths),
                    int((lengths.astype(np.int64)**2).sum()))


def model_of(options: argparse.Namespace, device: torch.device, dtype: str) -> Any:
    """Random weights, LoRA as released; made on the device (drawing seven billion numbers on a CPU takes minutes)."""
    settings = LlmModelSettings(sizes=SIZES[options.size], dtype=dtype, lora={"lora_dropout": 0.05}, attention="sdpa")
    with torch.device(device):
        return build_llm(settings, SimpleNamespace(vocabulary=VOCABULARIES[options.size]), device)


def prepare(model: Any, lever: Lever, device: torch.device) -> None:
    """Set the model to a lever's switches, whatever it was set to before; only from FP8 there is no way back."""
    if lever.fp8:
        freeze_in_fp8(model)
    llama = find_llama(model)
    set_attention(llama, lever.attention, device)
    set_checkpointing(llama, True)
    for number, layer in enumerate(llama.model.layers):
        layer.gradient_checkpointing = lever.checkpointing is True or (
            lever.checkpointing == "selective" and number % 2 == 0)
        layer._compiled_call_impl = None
        if lever.compile:
            layer.compile()


def step_of(model: Any, lever: Lever, batch: LlmBatch, device: torch.device, dtype: torch.dtype
            ) -> Callable[[], Tensor]:
    """One optimiser step on the batch, returning the loss."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = build_optimizer(model, OptimSettings(name=lever.optimizer))

    def loss() -> Tensor:
        if lever.loss == "transformers":
            positions = None if batch.attention_mask is not None else batch.position_ids
            return model(input_ids=batch.input_ids, labels=batch.labels, position_ids=positions,
                         attention_mask=batch.attention_mask, use_cache=False).loss
        return packed_loss(model, batch, kind=lever.loss).mean

    def step() -> Tensor:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            value = loss()
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return value.detach()

    return step


def timed(model: Any, lever: Lever, options: argparse.Namespace, device: torch.device, dtype: torch.dtype,
          peak: float | None) -> dict[str, Any]:
    """Figures of one setting."""
    padded, packed = SHAPES[options.size]
    rows, length = (options.rows or packed[0], options.length or packed[1]) if lever.packed else padded
    make = packed_batch if lever.packed else padded_batch
    batch = make(VOCABULARIES[options.size], rows, length).to(device)
    prepare(model, lever, device)
    step = step_of(model, lever, batch, device, dtype)
    started = time.perf_counter()
    first_loss = float(step())
    first = time.perf_counter() - started
    taken = measure(step, device, options.repeats, warmup=2 if device.type == "cuda" else 1)
    tflops = step_flops(model, batch.tokens, batch.squares / batch.tokens, batch.learned) / taken["seconds"] / 1e12
    return {"useful_tokens_per_second": rounded(batch.tokens / taken["seconds"]),
            "positions_per_second": rounded(rows * length / taken["seconds"]),
            "fill": round(batch.tokens / (rows * length), 4), "rows": rows, "length": length,
            "seconds_per_step": rounded(taken["seconds"]), "first_step_seconds": round(first, 2),
            "first_loss": round(first_loss, 4), "loss": round(float(step()), 4), **utilisation(tflops, peak)}


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Time the language model's training, lever by lever.")
    common_flags(parser, tuple(SIZES), 5, peak_flag=True)
    parser.add_argument("--levers", help=f"only these, with commas: {', '.join(LEVERS)}")
    parser.add_argument("--rows", type=positive, help="packed rows of a step")
    parser.add_argument("--length", type=row_length, help="positions of a packed row")
    options = parser.parse_args()
    runtime = runtime_of(parser, options)
    device, dtype = runtime.device, runtime.dtype
    names = options.levers.split(",") if options.levers else [
        name for name, lever in LEVERS.items() if has_fp8(device) or not lever.fp8
        if device.type == "cuda" or not (lever.compile or lever.loss == "liger")]
    refuse_unknown(parser, names, LEVERS, "lever")
    if [name for name in names if LEVERS[name].fp8] != names[sum(not LEVERS[name].fp8 for name in names):]:
        parser.error("the fp8 levers must come last: they change the base permanently")
    peak = peak_tflops(options.peak_tflops, device, dtype)
    model = model_of(options, device, {torch.float32: "fp32", torch.bfloat16: "bf16"}.get(dtype, "bf16"))
    first: float | None = None
    for name in names:
        forget(device)
        try:
            results = timed(model, LEVERS[name], options, device, dtype, peak)
            first = first or results["useful_tokens_per_second"]
            results[f"ratio_to_{names[0]}"] = round(results["useful_tokens_per_second"] / first, 3)
        except RuntimeError as error:
            results = failure(error)
        print_line("llm_training", device, {
            "size": options.size, "lever": name, **dataclasses.asdict(LEVERS[name]), "runtime": str(runtime),
            "parameters": sum(p.numel() for p in model.parameters()),
            "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "repeats": options.repeats}, results, REFERENCES if options.size == "7b" else None)


if __name__ == "__main__":
    main()
