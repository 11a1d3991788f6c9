"""Time SEED-X: words per second about a picture, seconds of a drawing and of an edit, memory by part. One JSON line.

    python benchmarks/seedx.py                                              # a tiny SEED-X with random weights
    python benchmarks/seedx.py --model seed-x-i --device cuda --dtype float16      # the released weights
    python benchmarks/seedx.py --model seed-x-i --device cuda --dtype float16 --quantization 4bit --offload

`--model` takes what `SeedX.from_pretrained` takes. Peak memory is the GPU's; on a CPU it is the process's, libraries
included. Without a GPU the line says so: times of a CPU tell nothing about the released sizes.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from shared import common_flags, failure, measure, positive, print_line, rounded

from seed_multimodal.device import Runtime
from seed_multimodal.entry import DONE, guarded
from seed_multimodal.errors import SeedError
from seed_multimodal.quiet import quiet_libraries
from seed_multimodal.systems.seed_x import SeedX

TINY = Path(__file__).resolve().parents[1] / "tests" / "systems"


def open_model(options: argparse.Namespace, scratch: str) -> tuple[SeedX, str]:
    """The system to time, and what it is."""
    name, what = options.model, str(options.model)
    if name is None:
        # Writing its files, transformers looks for DeepSpeed, which would report on stdout what accelerator it found.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        sys.path.insert(0, str(TINY))
        import tiny_seed_x

        name, what = tiny_seed_x.build(Path(scratch) / "tiny", stage=2), "random weights, tiny size"
    return SeedX.from_pretrained(name, device=options.device, dtype=options.dtype, log=None, offload=options.offload,
                                 quantization=options.quantization), what


def time_words(system: SeedX, picture: Image.Image, options: argparse.Namespace, device: torch.device
               ) -> dict[str, Any]:
    """Tokens per second of an answer about a picture, the picture's reading included, and seconds of that reading."""
    settings = {"max_new_tokens": options.new, "do_sample": False}
    speaker, counts = system.speaker, [0]
    answer = speaker.answer

    def counted(*given: Any, **more: Any) -> Any:
        ids = answer(*given, **more)
        counts.append(len(ids))
        return ids

    speaker.answer = counted  # type: ignore[method-assign]
    taken = measure(lambda: system.describe(picture, **settings), device, options.repeats)
    del speaker.answer
    seen = measure(lambda: system.pictures.read([picture]), device, options.repeats)
    return {"tokens_per_second": rounded(counts[-1] / taken["seconds"]), "tokens": counts[-1],
            "answer_seconds": rounded(taken["seconds"]), "read_picture_seconds": rounded(seen["seconds"])}


def time_pictures(system: SeedX, picture: Image.Image, options: argparse.Namespace, device: torch.device
                  ) -> dict[str, Any]:
    """Seconds of a drawing, of an edit (where the de-tokenizer reads a condition) and of a reconstruction."""
    decode = {} if options.steps is None else {"num_inference_steps": options.steps}
    works = {"draw_seconds": lambda: system.draw(options.text, **decode),
             "edit_seconds": lambda: system.edit(picture, "Make it under the sunset", **decode),
             "reconstruct_seconds": lambda: system.reconstruct(picture, **decode)}
    results: dict[str, Any] = {}
    for name, work in works.items():
        try:
            results[name] = rounded(measure(work, device, options.repeats)["seconds"])
        except SeedError as error:  # a system that does not edit; an answer without a picture
            results[name] = failure(error)
    return results


def memory_of(system: SeedX, device: torch.device) -> dict[str, Any]:
    """GiB: the plan made before a tensor was read, and the peak."""
    plan = {} if system.memory is None else {
        part.name: rounded(part.weights / 2**30) for part in system.memory.parts}
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    return {"planned_gib": plan, "peak_gib": rounded(peak / 2**30)}


def timed(options: argparse.Namespace) -> int:
    """Time and print the line; returns the exit code.

    Raises:
        CheckpointError, ConfigError: a part that is missing or damaged.
    """
    quiet_libraries(libraries=("transformers", "diffusers"))
    with tempfile.TemporaryDirectory() as scratch:
        system, what = open_model(options, scratch)
        parameter = next(system.agent.output_resampler.parameters())
        device = parameter.device
        picture = Image.linear_gradient("L").resize(options.picture).convert("RGB")
        results = {**time_words(system, picture, options, device), **time_pictures(system, picture, options, device),
                   "memory": memory_of(system, device)}
    settings = {"model": what, "runtime": str(Runtime(device, parameter.dtype)), "picture": list(options.picture),
                "new_tokens": options.new, "repeats": options.repeats, "quantization": options.quantization,
                "offload": options.offload}
    if device.type != "cuda":
        settings["gpu"] = "not measured on GPU"
    print_line("seedx", device, settings, results)
    return DONE


def size(text: str) -> tuple[int, int]:
    """`800x600` → the numbers, for argparse."""
    width, _, height = text.partition("x")
    return positive(width), positive(height)


def main() -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Time SEED-X.")
    common_flags(parser, ("nano",), 3, model=True)
    parser.add_argument("--picture", type=size, default=(800, 600), help="width and height of the picture shown")
    parser.add_argument("--new", type=positive, default=120, help="new tokens at most")
    parser.add_argument("--steps", type=positive, default=None, help="diffusion steps (default: the system's)")
    parser.add_argument("--quantization", choices=("8bit", "4bit"), default=None)
    parser.add_argument("--offload", action="store_true", help="parts are on the device only while they work")
    parser.add_argument("--text", default="A small red house under a blue sky.", help="what is drawn")
    options = parser.parse_args()
    return guarded("seedx", False, lambda: timed(options))


if __name__ == "__main__":
    raise SystemExit(main())
