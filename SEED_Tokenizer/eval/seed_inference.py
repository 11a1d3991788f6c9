"""An image → 32 codes → an image, as the original's demo: `seed reconstruct` with its defaults.

python eval/seed_inference.py --image dog.jpg             the original tokenizer → recon_dog.png
python eval/seed_inference.py --model nano --json         the shipped tokenizer; also prints codes
python eval/seed_inference.py --model ../outputs/tokenizer   an exported tokenizer
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "src"))  # runs from a checkout that is not installed

if __name__ == "__main__":
    from seed_multimodal.cli.common import program_parser, source_stem
    from seed_multimodal.cli.main import main
    from seed_multimodal.disk import file_stem

    parser = program_parser("seed_inference.py", str(__doc__))
    parser.epilog = "Further flags are those of `seed reconstruct`."
    parser.add_argument("--image", default=str(ROOT / "images" / "cat.jpg"))
    parser.add_argument("--out", metavar="FILE", help="default: recon_NAME.png")
    args, more = parser.parse_known_args()

    out = args.out or f"recon_{file_stem(source_stem(args.image))}.png"
    defaults = "--model 8b --seed 42 --dtype float32".split()
    sys.exit(main(["reconstruct", args.image, "--out", out, *defaults, *more]))
