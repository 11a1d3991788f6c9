"""Compare decoders of nano's codes: reconstruction of held-out scenes.

One JSON line for each decoder and setting: the judge's labels, R@1 among the originals, PSNR, SSIM,
images a CPU-second; and the paired differences to the first line.

    python -m seed_nano.report.decoders log/a/decoder log/b/decoder --steps 4 20 --guidance 1 3
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from PIL import Image

from seed_multimodal.evaluation.metrics import FloatArray, bootstrap
from seed_multimodal.images.sheet import Cell, Row, contact_sheet
from seed_multimodal.models.seed.spec import SeedLlamaConfig
from seed_multimodal.pipelines.config import SystemConfig
from seed_multimodal.pipelines.images import open_images
from seed_nano.report.judge import Judge
from seed_nano.report.scoring import (
    image_labels,
    label_matches,
    retrieval,
    similarities,
    true_labels,
)
from seed_nano.world.scene import Scene, render
from seed_nano.world.splits import scenes
from seed_nano.world.targets import JUDGE_CLASSES

SHOWN = 8  # scenes of the sheet


def main() -> None:
    """Draw the same scenes from their codes with the same seeds by each decoder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("decoders", nargs="+", type=Path, help="diffusion folders")
    parser.add_argument("--model", default="pretrained/nano")
    parser.add_argument("--split", default="val")
    parser.add_argument("--scenes", type=int, default=120)
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[None], help="default: the folder's"
    )
    parser.add_argument("--guidance", type=float, nargs="+", default=[None], help="likewise")
    parser.add_argument("--sheet", type=Path, help="image file with some of the drawings")
    args = parser.parse_args()

    # 1. The scenes, their codes, and the judge.
    targets = scenes(args.split)[: args.scenes]
    config = SystemConfig.find(args.model)
    assert isinstance(config, SeedLlamaConfig) and config.image_size is not None
    originals = [Image.fromarray(render(scene, config.image_size)) for scene in targets]
    codes = open_images(config, device="cpu", dtype="float32").encode(originals)
    judge = Judge.from_pretrained(Path(args.model) / "judge")
    rows = [Row("image", [Cell(image) for image in originals[:SHOWN]])]

    # 2. Each decoder in each setting.
    first: dict[str, FloatArray] = {}
    for folder in args.decoders:
        config.detokenizer = folder
        codec = open_images(config, device="cpu", dtype="float32")
        codec.prepare_drawing()
        for steps, guidance in product(args.steps, args.guidance):
            settings = codec.decoder.check_settings(
                num_inference_steps=steps, guidance_scale=guidance
            )
            steps = settings.num_inference_steps
            guidance = settings.guidance_scale
            started = time.process_time()
            drawings = codec.draw(
                codes,
                seeds=range(len(codes)),
                batch_size=30,
                num_inference_steps=steps,
                guidance_scale=guidance,
            )
            speed = len(drawings) / (time.process_time() - started)

            # 3. Its scores, with the difference to the first decoder's of each scene.
            values = scores(judge, drawings, originals, targets)
            line: dict[str, object] = {
                "decoder": str(folder),
                "steps": steps,
                "guidance": guidance,
                "scenes": len(targets),
                "images_per_cpu_second": round(speed, 1),
            }
            for name, column in values.items():
                line[name] = round(float(column.mean()), 3)
            if first:
                line["difference"] = {
                    name: bootstrap(column - first[name]).to_json()
                    for name, column in values.items()
                }
            first = first or values
            print(json.dumps(line), flush=True)
            title = f"{folder.parent.name}, {steps} steps, guidance {guidance:g}"
            rows.append(Row(title, [Cell(image) for image in drawings[:SHOWN]]))
    if args.sheet is not None:
        contact_sheet(rows, "Reconstruction from codes", cell=96).save(args.sheet)


def scores(
    judge: Judge,
    drawings: Sequence[Image.Image],
    originals: Sequence[Image.Image],
    targets: Sequence[Scene],
) -> dict[str, FloatArray]:
    """Scores of each scene, `[N]`."""
    matches = label_matches(image_labels(judge, drawings), true_labels(targets))
    return {
        "all": matches.all(1).astype(float),
        **dict(zip(JUDGE_CLASSES, matches.T.astype(float), strict=True)),
        "r1": retrieval(judge, drawings, originals),
        **similarities(drawings, targets),
    }


if __name__ == "__main__":
    main()
