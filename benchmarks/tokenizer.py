"""Time the SEED-2 tokenizer: pictures → codes, and codes → embedding, against its plain path. JSON lines.

    python benchmarks/tokenizer.py                                    # the shipped nano weights
    python benchmarks/tokenizer.py --device cuda --size released --dtype bf16 --batches 1,32,256 --ladder \
        --peak-tflops measured                                        # random weights, one line per lever and batch

Without `--ladder`: one line for the best lever known (`--levers` names another). `plain` is this library's own modules
with attention as three operations and nothing compiled; every line carries the ratio to it, measured in the same run,
and the share of codes equal to fp32 with the same weights. A lever that fails gives a line with its error.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from shared import (
    common_flags,
    failure,
    fill_random,
    forget,
    measure,
    part_of,
    peak_tflops,
    positive,
    print_line,
    rounded,
    utilisation,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from seed_multimodal.device import RELEASED_FP16, choose_device
from seed_multimodal.errors import SeedError
from seed_multimodal.tokenizers.fast import GRAPH_SIZES, Levers, optimise
from seed_multimodal.tokenizers.flops import encode_flops
from seed_multimodal.tokenizers.qformer import QFormerConfig
from seed_multimodal.tokenizers.seed2 import Seed2Config, Seed2Tokenizer
from seed_multimodal.vision.eva import EvaConfig

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / "pretrained" / "nano"
# The original's code, random weights of released size, fp16 on one H200 (2026-11-20).
REFERENCES = {"encode_images_per_second": {"1": 34.1, "32": 436, "256": 524},
              "decode_per_second": {"1": 559, "256": 141000}}


@dataclass(frozen=True)
class Rung:
    """One setting of the ladder: the library's modules, or `optimise` with these choices."""

    packed: bool = True
    literal: bool = False
    compile: bool | str = False
    graph: bool = False
    levers: dict[str, Any] = field(default_factory=dict)


RUNGS = {  # the slowest to set up last
    "plain": Rung(packed=False, literal=True),
    "sdpa": Rung(packed=False),
    "packed": Rung(),
    "graph": Rung(graph=True),
    "compile": Rung(compile=True),
    "compile-graph": Rung(compile=True, graph=True),
    "packed-flash": Rung(levers={"attention": "flash"}),
    "packed-cudnn": Rung(levers={"attention": "cudnn"}),
    "packed-efficient": Rung(levers={"attention": "efficient"}),
    "packed-heads-96": Rung(levers={"head_width": 96}),
    "packed-heads-128": Rung(levers={"head_width": 128}),
    "packed-stream-bf16": Rung(levers={"residual_dtype": torch.bfloat16}),
    "packed-queries-bf16": Rung(levers={"query_dtype": torch.bfloat16}),
    "packed-gelu-tanh": Rung(levers={"gelu": "tanh"}),
    "graph-gelu-tanh": Rung(graph=True, levers={"gelu": "tanh"}),
    "compile-stream-bf16": Rung(compile=True, levers={"residual_dtype": torch.bfloat16}),
    "compile-cudnn": Rung(compile=True, levers={"attention": "cudnn"}),
    "compile-gelu-tanh": Rung(compile=True, levers={"gelu": "tanh"}),
    "compile-cudnn-gelu-tanh": Rung(compile=True, levers={"attention": "cudnn", "gelu": "tanh"}),
    "compile-graph-cudnn": Rung(compile=True, graph=True, levers={"attention": "cudnn"}),
    "max-autotune": Rung(compile="max-autotune"),
    "max-autotune-tma": Rung(compile="max-autotune-tma"),
    "max-autotune-tma-cudnn": Rung(compile="max-autotune-tma", levers={"attention": "cudnn"}),
    "max-autotune-graph": Rung(compile="max-autotune", graph=True),
}
ON_CPU = ("plain", "sdpa", "packed", "packed-gelu-tanh")
BEST = {"cuda": "compile", "cpu": "packed"}
BEST_SMALL = {"cuda": "compile-graph"}  # for batches that fit a graph


def nano_config() -> Seed2Config:
    """A tokenizer of about the shipped size, for timing without weights."""
    return Seed2Config(vit=EvaConfig(64, 16, 192, 5, 6, 768), qformer=QFormerConfig(width=192, depth=4, heads=6,
                       mlp_width=768), codebook_size=512, codebook_dim=16, decode_depth=3, image_features_dim=256)


def load(options: argparse.Namespace, device: torch.device) -> tuple[Seed2Tokenizer, str]:
    """The tokenizer in float32 (weights are rounded once, by the lever) and what it is."""
    folder = Path(options.model) if options.model else SHIPPED if options.size == "nano" else None
    if folder is not None and (options.model or (folder / "system.json").is_file()):
        name = folder.relative_to(ROOT) if folder == SHIPPED else folder
        part = part_of(folder, "tokenizer")
        return Seed2Tokenizer.from_pretrained(part, device=device), str(name)
    with torch.device("meta"):
        model = Seed2Tokenizer(Seed2Config() if options.size == "released" else nano_config())
    fill_random(model, device, torch.float32)
    return model, f"random weights, {options.size} size"


def pictures(count: int, size: int, model: str) -> Tensor:
    """Normalised pixels `[count, 3, S, S]`: held-out scenes for nano weights, noise for random weights."""
    if not model.startswith("random") and size == 64:
        from seed_nano.train.pixels import scene_pixels, to_clip
        from seed_nano.world.evaluation import scenes

        with contextlib.suppress(SeedError):  # the drawings may be missing
            found = to_clip(scene_pixels(scenes("val")[:count], size))
            return found[torch.arange(count) % len(found)]  # a batch may be larger than the list
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


@contextlib.contextmanager
def literal_attention() -> Iterator[None]:
    """Scores, softmax and weighted sum as operations of their own, in the model's dtype, as the original has them."""
    allowed = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(allowed)


def encoder_of(rung: Rung, master: Seed2Tokenizer, dtype: torch.dtype) -> Callable[..., Tensor]:
    """`encode` of one setting."""
    if rung.packed:
        levers = Levers(dtype=dtype, **rung.levers)
        return optimise(master, compile=rung.compile, cuda_graph=rung.graph, levers=levers).encode
    model = copy.deepcopy(master).to(dtype)
    if not rung.literal:
        return model.encode

    def encode(images: Tensor, *, batch_size: int | None = None) -> Tensor:
        with literal_attention():
            return model.encode(images, batch_size=batch_size)

    return encode


class Bench:
    """The tokenizer in float32, its codes of a set of pictures, and the clock."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.runtime = choose_device(options.device, options.dtype, log=None, fp16=RELEASED_FP16)
        self.device = self.runtime.device
        self.master, self.model = load(options, self.device)
        self.config = self.master.config
        self.batches = options.batches
        self.peak = peak_tflops(options.peak_tflops, self.device, self.runtime.dtype)
        self.compared = options.images or (256 if self.device.type == "cuda" else 64)
        pixels = pictures(max(self.compared, *self.batches), self.config.vit.image_size, self.model)
        self.pixels = pixels.to(self.device)
        self.exact = self.master.encode(self.pixels[: self.compared], batch_size=32)
        self.plain: dict[int, float] = {}

    def encode_seconds(self, name: str, batch: int, encode: Callable[..., Tensor]) -> float:
        """Median seconds of one batch; kept for the plain path."""
        images = self._batch(batch)
        repeats = self.options.repeats * (max(1, 64 // batch) if self.device.type == "cuda" else 1)
        seconds = measure(lambda: encode(images), self.device, repeats, warmup=3 if images.is_cuda else 1)["seconds"]
        if name == "plain":
            self.plain[batch] = seconds
        return seconds

    def figures(self, name: str, batch: int, encode: Callable[..., Tensor]) -> dict[str, Any]:
        """Speed at one batch size, closeness to fp32 there, ratio to the plain path if it was measured."""
        started = time.perf_counter()
        encode(self._batch(batch))
        first = time.perf_counter() - started
        seconds = self.encode_seconds(name, batch, encode)
        codes = encode(self.pixels[: self.compared], batch_size=batch)
        tflops = encode_flops(self.config) * batch / seconds / 1e12
        equal = codes == self.exact
        figures: dict[str, Any] = {
            "images_per_second": round(batch / seconds, 1), "latency_ms": rounded(1e3 * seconds),
            "share_equal_fp32": round(float(equal.float().mean()), 5),  # of codes; of pictures with all 32 of them:
            "share_pictures_equal_fp32": round(float(equal.all(dim=1).float().mean()), 5),
            "first_call_seconds": round(first, 2), **utilisation(tflops, self.peak)}
        if batch in self.plain:
            figures["times_plain"] = round(self.plain[batch] / seconds, 2)
        return figures

    def decode_per_second(self, batch: int) -> float:
        """Codes → embeddings, in the asked dtype."""
        model = copy.deepcopy(self.master).to(self.runtime.dtype)
        codes = self.exact[torch.arange(batch) % len(self.exact)]
        return round(batch / measure(lambda: model.decode(codes), self.device, self.options.repeats)["seconds"], 1)

    def settings(self) -> dict[str, Any]:
        """Settings of the run, for every line."""
        places = self.config.num_query
        distinct = sum(len(self.exact[:, place].unique()) for place in range(places)) / places
        return {"model": self.model, "size": "released" if self.config == Seed2Config() else "nano",
                "parameters": sum(p.numel() for p in self.master.parameters()), "runtime": str(self.runtime),
                "dtype": str(self.runtime.dtype).removeprefix("torch."), "repeats": self.options.repeats,
                "compared_images": len(self.exact), "distinct_codes_per_position": round(distinct, 1),
                "gflop_per_image": round(encode_flops(self.config) / 1e9, 3)}

    def line(self, settings: dict[str, Any], results: dict[str, Any]) -> None:
        """Print a line; the references are for the released size only."""
        is_released = self.config == Seed2Config()
        print_line("tokenizer", self.device, {**self.settings(), **settings}, results,
                   REFERENCES if is_released else None)

    def _batch(self, batch: int) -> Tensor:
        return self.pixels[:batch].to(self.runtime.dtype)


def ladder(bench: Bench, names: list[str]) -> None:
    """One line per setting and batch size, the plain path first."""
    for name in names:
        rung = RUNGS[name]
        batches = [b for b in bench.batches if not rung.graph or b in GRAPH_SIZES]
        encode = None
        for batch in batches:
            try:
                encode = encode or encoder_of(rung, bench.master, bench.runtime.dtype)
                results = bench.figures(name, batch, encode)
            except (RuntimeError, SeedError) as error:
                results = failure(error)
            bench.line({"lever": name, "batch": batch}, results)
        if encode is not None and bench.options.profile and batches:
            profile(name, encode, bench.pixels[: batches[-1]].to(bench.runtime.dtype), Path(bench.options.profile))
        forget(bench.device)


def single(bench: Bench, name: str | None) -> None:
    """One line: the asked setting, or the best one known for each batch size."""
    results: dict[str, dict[str, Any]] = {}
    for batch in bench.batches:
        plain = encoder_of(RUNGS["plain"], bench.master, bench.runtime.dtype)
        bench.encode_seconds("plain", batch, plain)
        del plain
        kind = bench.device.type
        best = BEST_SMALL.get(kind) if batch in GRAPH_SIZES else None
        lever = name or best or BEST.get(kind, "packed")
        figures = bench.figures(lever, batch, encoder_of(RUNGS[lever], bench.master, bench.runtime.dtype))
        figures = {"encode_" + key if key == "images_per_second" else key: value for key, value in figures.items()}
        for key, value in {**figures, "lever": lever, "decode_per_second": bench.decode_per_second(batch)}.items():
            results.setdefault(key, {})[str(batch)] = value
        forget(bench.device)
    bench.line({}, results)


def profile(name: str, encode: Callable[..., Tensor], images: Tensor, file: Path) -> None:
    """Append a table of the kernels that take the time of one batch."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if images.is_cuda:
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as seen:
        encode(images)
    key = "self_cuda_time_total" if images.is_cuda else "self_cpu_time_total"
    table = seen.key_averages().table(sort_by=key, row_limit=20, max_name_column_width=90)
    with file.open("a", encoding="utf-8") as out:
        out.write(f"{name}, batch {len(images)}\n{table}\n")


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Time the SEED-2 tokenizer.")
    common_flags(parser, ("nano", "released"), 5, batches="1,32,256", model=True, peak_flag=True)
    parser.add_argument("--images", type=positive,
                        help="pictures whose codes are compared with fp32 (256, on a CPU 64)")
    parser.add_argument("--ladder", action="store_true", help="one line per lever and batch size")
    parser.add_argument("--levers", help=f"only these, with commas: {', '.join(RUNGS)}")
    parser.add_argument("--profile", help="with --ladder: append tables of kernels to this file")
    options = parser.parse_args()
    names = options.levers.split(",") if options.levers else None
    unknown = [name for name in names or () if name not in RUNGS]
    if unknown:
        sys.exit(f"Unknown lever {unknown[0]!r}: use {', '.join(RUNGS)}.")
    try:
        bench = Bench(options)
    except SeedError as error:
        sys.exit(f"tokenizer: {error}")
    if options.ladder:
        asked = names or (RUNGS if bench.device.type == "cuda" else ON_CPU)
        ladder(bench, list(dict.fromkeys(("plain", *asked))))
    else:
        single(bench, names[0] if names else None)


if __name__ == "__main__":
    main()
