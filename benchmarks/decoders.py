"""Compare decoders, numbers of drawing steps and guidance on the same held-out scenes.

One JSON line for each section, split, decoder and setting: shares of right labels by the judge,
nearest originals (R@1), PSNR, SSIM, images a CPU-second; and the paired differences to the first
line of the section. `--out` writes them as `lines`.

    python benchmarks/decoders.py --steps 4 3 2 --splits val --limit 250
    python benchmarks/decoders.py --decoders log/a/decoder log/b/decoder --guidance 1 3
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

from PIL import Image

from seed_multimodal.disk import JsonObject, replace_json
from seed_multimodal.evaluation.metrics import FloatArray, bootstrap
from seed_multimodal.images.sheet import Cell, Row, contact_sheet
from seed_multimodal.pipelines.config import SystemConfig
from seed_nano.report.judge import Judge, find_judge
from seed_nano.report.samples import Sizes
from seed_nano.report.scoring import (
    OptionalImages,
    image_labels,
    label_matches,
    retrieval,
    similarities,
    true_labels,
)
from seed_nano.report.systems import System, load_system
from seed_nano.world.scene import Scene, scene_image
from seed_nano.world.splits import HELD_OUT_SPLITS, scenes
from seed_nano.world.targets import JUDGE_CLASSES
from seed_nano.world.words import describe

SHOWN = 8  # scenes of the sheet
Decode = Callable[..., OptionalImages]


def main() -> None:
    """Encode and generate once, decode by each decoder with each setting."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="pretrained/nano")
    parser.add_argument(
        "--decoders", nargs="+", default=[None], help="diffusion folders of a SEED-LLaMA"
    )
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[None], help="default: the folder's"
    )
    parser.add_argument("--guidance", type=float, nargs="+", default=[None], help="likewise")
    parser.add_argument("--splits", nargs="+", default=["val"], choices=HELD_OUT_SPLITS)
    parser.add_argument("--limit", type=int, default=250, help="drawings; twice as many images")
    parser.add_argument("--sheet", type=Path, help="image file with some of the drawings")
    parser.add_argument("--out", type=Path, help="JSON file of all lines")
    args = parser.parse_args()
    judge = Judge.from_pretrained(find_judge(args.model, None))
    sizes = Sizes.limited(args.limit)

    # 1. The systems, equal but for their decoders.
    systems: dict[str, System] = {}
    for folder in args.decoders:
        parts = {"detokenizer": folder} if folder else {}
        config = SystemConfig.find(args.model, **parts)
        config.known_images = None  # needs the shipped decoder's conditioner
        system = load_system(config, device="cpu", dtype="float32", log=None)
        systems[str(folder or args.model)] = system
    system = next(iter(systems.values()))

    rows: list[Row] = []
    lines: list[JsonObject] = []
    for split in args.splits:
        # 2. Images in the system's representation: real ones, and those of descriptions.
        targets = scenes(split)[: sizes.gallery]
        real = [scene_image(scene, system.image_size) for scene in targets]
        encoded = system.encode(real)
        sections: list[tuple[str, Decode, Sequence[object], list[Scene]]] = [
            ("reconstruction", System.rebuild, encoded, targets)
        ]
        if split != "things":  # only reconstructed
            drawn = targets[: sizes.scenes]
            answers = system.draw(list(map(describe, drawn)))
            sections.append(("drawing", System.decode, answers, drawn))

        # 3. The same ones by each decoder in each setting, with the differences to the first.
        for section, decode, inputs, wanted in sections:
            rows.append(Row(f"{split}, {section}", list(map(Cell, real[:SHOWN]))))
            first: dict[str, FloatArray] = {}
            settings = product(systems.items(), args.steps, args.guidance)
            for (name, decoding), steps, guidance in settings:
                images, line = timed(decoding, decode, inputs, steps, guidance)
                values = scores(judge, images, real, wanted)
                first = first or values
                line |= {"split": split, "section": section, "decoder": name}
                line |= {key: bootstrap(column).to_json() for key, column in values.items()}
                line["difference"] = {
                    key: bootstrap(column - first[key]).to_json() for key, column in values.items()
                }
                print(json.dumps(line), flush=True)
                lines.append(line)
                title = f"{name}, {line['steps']} steps, guidance {line['guidance']:g}"
                rows.append(Row(title, list(map(Cell, images[:SHOWN]))))
    if args.out is not None:
        replace_json(args.out, {"lines": lines})
    if args.sheet is not None:
        contact_sheet(rows, "Decoders on the same scenes", cell=96).save(args.sheet)


def timed(
    system: System,
    decode: Decode,
    inputs: Sequence[object],
    steps: int | None,
    guidance: float | None,
) -> tuple[OptionalImages, dict[str, object]]:
    """Images decoded with some settings (None: the decoder's), and those with the speed."""
    decoder = system.codec.decoder
    decoder.defaults = decoder.check_settings(num_inference_steps=steps, guidance_scale=guidance)
    started = time.process_time()
    images = decode(system, inputs)
    seconds = time.process_time() - started
    return images, {
        "steps": decoder.defaults.num_inference_steps,
        "guidance": decoder.defaults.guidance_scale,
        "images_per_cpu_second": round(len(images) / seconds, 1),
    }


def scores(
    judge: Judge, images: OptionalImages, real: Sequence[Image.Image], targets: Sequence[Scene]
) -> dict[str, FloatArray]:
    """Scores of each scene, `[N]`; a missing image is a grey one."""
    matches = label_matches(image_labels(judge, images), true_labels(targets)).astype(float)
    complete = [image or Image.new("RGB", real[0].size, "gray") for image in images]
    return {
        "all": matches.min(1),
        **dict(zip(JUDGE_CLASSES, matches.T, strict=True)),
        "r1": retrieval(judge, complete, real),
        **similarities(complete, targets),
    }


if __name__ == "__main__":
    main()
