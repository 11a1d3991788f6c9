"""Everything that computes, on pretended CUDA devices; a table of rows.

    python tests/support/pretend_cuda.py tests/support/pretend_cuda_rows.py [PATTERN ...]

Prints a line for each row whose name fits a pattern: `ok` or the error, and its CPU seconds. The
status is 1 if a row failed or none was found.
"""

import functools
import json
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import pretend_cuda
import pretend_cuda_parts
import torch
from pretend_cuda_tasks import FOX, common_tasks, failures_of, own_tasks, same
from repository import ROOT
from systems import load
from yaml_tables import read_tables

from seed_multimodal import MultimodalSystem
from seed_multimodal.errors import first_line

TABLES = read_tables(__file__)
PLACEMENTS = TABLES["placements"]
ROW = "row | "  # begins a row's line
EXACT = {"dtype": "float32"}  # answers are compared with the CPU's
Row = Callable[[Path], object]  # of an empty folder; it raises if something is wrong


@functools.cache
def expected_of(name: str) -> dict:
    """The results of a system's tasks on the CPU."""
    reference = load(name, **EXACT)
    tasks = common_tasks() | own_tasks(reference.config.system)
    return {task: run(reference) for task, run in tasks.items()}


def check_system(name: str, placement: str, folder):
    failures = failures_of(name, PLACEMENTS[placement], placement, expected_of(name))
    assert not failures, failures


def check_transformers(name: str, is_moved: bool, folder):
    """Loaded onto the first device, or moved to the second: answers, a loss, an image."""
    from transformers import AutoModelForMultimodalLM, AutoProcessor

    path = ROOT / "pretrained" / name
    open_model = partial(AutoModelForMultimodalLM.from_pretrained, path, dtype="float32")
    processor = AutoProcessor.from_pretrained(path)
    content = [{"type": "image", "image": str(FOX)}, {"type": "text", "text": "What is left?"}]
    inputs, drawing_inputs = (
        processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True,
            return_dict=True,
            add_generation_prompt=True,
            processor_kwargs={"generation_mode": mode},
        )
        for mode in ("text", "image")
    )

    def results(model) -> list[torch.Tensor]:
        batch = inputs.to(model.device)
        answer = model.generate(**batch, max_new_tokens=12)
        sample = model.generate(**batch, max_new_tokens=8, do_sample=True)
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        image = model.generate(**drawing_inputs.to(model.device), generation_mode="image")
        assert len(model.decode_image_tokens(image, num_inference_steps=1)) == 1
        gradient = model.get_input_embeddings().weight.grad
        images = model.system.images
        for part in (answer, sample, loss, gradient, images):
            assert part.device == images.drawing_device == model.device
        return [tensor.cpu() for tensor in (answer, loss.detach(), gradient)]

    expected = results(open_model(device_map="cpu"))
    model = open_model(device_map="cpu").to("cuda:1") if is_moved else open_model(device_map=0)
    assert str(model.device) == ("cuda:1" if is_moved else "cuda:0")
    for tensor, other in zip(results(model), expected, strict=True):
        torch.testing.assert_close(tensor, other)


def check_glm_image(placement: str, folder):
    from tiny_glm_image import picture

    from seed_glm_image.tiny import write_tiny

    write_tiny(folder, folder)
    source = picture(96, 64)

    def results(**options) -> list:
        system = MultimodalSystem.from_pretrained(folder, log=None, **options)
        small = {"height": 64, "width": 96, "num_inference_steps": 1}
        codes = [row.tolist() for row in system.tokenize([source])]
        return [codes, system.draw("a fox", **small), system.edit(source, "a", 1)]

    options = PLACEMENTS[placement]
    answers = results(**options)
    assert "dtype" not in options or same(answers, results(device="cpu", **EXACT))


def check_quantizer(options: dict, folder):
    """Start, steps under autocast, and codes that are moved."""
    from seed_multimodal.nn.quantizer import VectorQuantizer, build_quantizer

    is_learned = "kind" not in options
    build = VectorQuantizer if is_learned else build_quantizer
    quantizer = build(size=16, dim=4, **options).to("cuda:1").train()
    features = torch.randn(8, 6, 4, device="cuda:1", requires_grad=True)
    if is_learned:
        quantizer.init_from(features.detach())
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16):
            quantized, loss, codes = quantizer(features)
        (quantized.square().mean() + loss).backward()
        counts = quantizer.update()
    if is_learned:
        quantizer.restart(counts == counts.min(), features.detach())
    rows = quantizer.lookup(codes)
    for tensor in (quantized, loss, codes, counts, rows, features.grad):
        assert str(tensor.device) == "cuda:1"


def check_command(command: str, folder):
    from seed_multimodal.cli.main import main

    captions = folder / "captions.json"
    images = FOX.parent
    records = [{"image": name, "caption": "a fox"} for name in ("fox.png", "cat.jpg")]
    captions.write_text(json.dumps(records))
    values = {"captions": captions, "images": images, "out": folder / "out"}
    argv = [argument.format(**values) for argument in command.split()]
    model = [] if "verify" in argv else ["--model", "nano"]
    assert main([*argv, *model, "--device", "cuda"]) == 0


def check_training(trainer, overrides: list[str], folder):
    """Four steps, then two by resuming, and the result is used."""
    parts, output = folder / "parts", folder / "output"
    parts.mkdir()
    trainer.parts(parts)
    os.environ.update(trainer.variables(parts))
    for n_steps in (4, 6):
        assert trainer.main(trainer.arguments(parts, output, n_steps, 2, overrides)) == 0
    assert list(trainer.losses(output)) == [1, 2, 3, 4, 5, 6]
    trainer.use(parts, output)


def all_rows() -> dict[str, Row]:
    from trainers import TRAINERS

    rows: dict[str, Row] = {}
    for name, check in vars(pretend_cuda_parts).items():
        if name.startswith("check_"):
            rows[f"moves: {name[6:]}"] = lambda folder, check=check: check()
    for system, placements in TABLES["systems"].items():
        for placement in placements:
            rows[f"{system}: {placement}"] = partial(check_system, system, placement)
        for loaded, is_moved in (("device_map=0", False), ("moved", True)):
            rows[f"transformers: {system}, {loaded}"] = partial(
                check_transformers, system, is_moved
            )
    for placement in TABLES["glm_image"]:
        rows[f"GLM-Image: {placement}"] = partial(check_glm_image, placement)
    for name, options in TABLES["quantizers"].items():
        rows[f"quantizers: {name}"] = partial(check_quantizer, options)
    for command in TABLES["commands"]:
        rows[f"commands: {command}"] = partial(check_command, command)
    trainers = {trainer.name: trainer for trainer in TRAINERS}
    for group, training in TABLES["trainings"].items():
        for name in training["trainers"]:
            check = partial(check_training, trainers[name], training["overrides"])
            rows[f"{group}: {name}"] = check
    assert {name.split(":")[0] for name in rows} == {*TABLES["groups"]}
    return rows


def main(patterns) -> int:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = all_rows()
    chosen = [name for name in rows if any(fnmatch(name, pattern) for pattern in patterns)]
    failed = not chosen
    for name in chosen:
        start = time.process_time()
        verdict = "ok"
        with tempfile.TemporaryDirectory() as folder:
            before = pretend_cuda.transfers()
            try:
                rows[name](Path(folder))
                after = pretend_cuda.transfers()
                assert after.to_device > before.to_device, "all was computed on the CPU"
            except (Exception, SystemExit) as error:  # noqa: BLE001  a row of the table
                failed = True
                verdict = f"{type(error).__name__}: {first_line(error)}"
                traceback.print_exc()
        print(f"{ROW}{name} | {time.process_time() - start:.1f} s | {verdict}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["*"]))
