"""A picture becomes 32 codes and a picture again, as the original's demo of the training application.

    python eval/seed_inference.py --image dog.jpg                        the released tokenizer → recon_dog.png
    python eval/seed_inference.py --model nano                           the shipped one
    python eval/seed_inference.py --model ../outputs/tokenizer           one that `seed export-tokenizer` made
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "src"))  # runs from a checkout that is not installed

from seed_multimodal.entry import DONE, add_device, guarded, log_line  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit code (2: refused, with one sentence on stderr)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", default=str(ROOT / "images" / "cat.jpg"), metavar="PICTURE")
    parser.add_argument("--out", metavar="FILE", help="default: recon_NAME.png")
    parser.add_argument("--model", default="released", metavar="NAME", help="released, nano, or a folder")
    parser.add_argument("--decoder", metavar="DIR", help="diffusers folder (default: the model's own)")
    parser.add_argument("--steps", type=int, metavar="N", help="denoising steps (default: the decoder's, released: 20)")
    parser.add_argument("--guidance-scale", type=float, metavar="G")
    parser.add_argument("--noise-level", type=int, default=0, metavar="N")
    parser.add_argument("--seed", type=int, default=42)
    add_device(parser, "float32", "float32, as the original")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    return guarded(parser.prog, args.debug, lambda: reconstruct(args))


def reconstruct(args: argparse.Namespace) -> int:
    """Print the codes and where the picture was saved."""
    from seed_multimodal.cli.common import save_image
    from seed_multimodal.device import choose_device
    from seed_multimodal.evaluation.tokenizer import open_tokenizer
    from seed_multimodal.progress import quiet_libraries

    quiet_libraries(args.debug)
    runtime = choose_device(args.device, args.dtype, log=log_line)
    codec = open_tokenizer(args.model, runtime, decoder=args.decoder, clip="none").codec
    codes = codec.encode([Path(args.image)])
    print(" ".join(map(str, codes[0].tolist())))
    picture = codec.draw(codes, seeds=[args.seed], num_inference_steps=args.steps, guidance_scale=args.guidance_scale,
                         noise_level=args.noise_level)[0]
    print(save_image(picture, Path(args.out or f"recon_{Path(args.image).stem}.png")))
    return DONE


if __name__ == "__main__":
    sys.exit(main())
