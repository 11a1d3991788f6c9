"""Compare decoders of nano's codes: reconstruction of held-out scenes.

One JSON line for each decoder and setting: the judge's labels, R@1 among the originals, PSNR, SSIM,
images a second.

    python -m seed_nano.report.decoders log/a/decoder log/b/decoder --steps 4 20 --guidance 1 3
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from PIL import Image

from seed_multimodal.images.sheet import Cell, Row, contact_sheet
from seed_multimodal.models.seed.spec import SeedLlamaConfig
from seed_multimodal.pipelines.config import SystemConfig
from seed_multimodal.pipelines.images import open_images
from seed_nano.report.judge import Judge
from seed_nano.report.scoring import image_labels, retrieval, score, similarity, true_labels
from seed_nano.world.scene import render
from seed_nano.world.splits import scenes

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
    parser.add_argument("--steps", type=int, nargs="+", default=[20])
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0])
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
    for folder in args.decoders:
        config.detokenizer = folder
        codec = open_images(config, device="cpu", dtype="float32")
        codec.prepare_drawing()
        for steps in args.steps:
            for guidance in args.guidance:
                settings = {"num_inference_steps": steps, "guidance_scale": guidance}
                started = time.process_time()
                drawings = codec.draw(codes, seeds=range(len(codes)), batch_size=30, **settings)
                seconds = time.process_time() - started
                labels = score(image_labels(judge, drawings), true_labels(targets))
                line = {
                    "decoder": str(folder),
                    "steps": steps,
                    "guidance": guidance,
                    "scenes": len(targets),
                    "images_per_cpu_second": round(len(drawings) / seconds, 1),
                    **{name: round(estimate.value, 3) for name, estimate in labels.items()},
                }
                line["r1"] = round(float(retrieval(judge, drawings, originals).mean()), 3)
                for name, estimate in similarity(drawings, targets).items():
                    line[name] = round(estimate.value, 3)
                print(json.dumps(line), flush=True)
                title = f"{folder.parent.name}, {steps} steps, guidance {guidance:g}"
                rows.append(Row(title, [Cell(image) for image in drawings[:SHOWN]]))
    if args.sheet is not None:
        contact_sheet(rows, "Reconstruction from codes", cell=96).save(args.sheet)


if __name__ == "__main__":
    main()
