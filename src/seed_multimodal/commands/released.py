"""Scripts with the original names: the picture round trip, and the three demonstrations of SEED-LLaMA.

Without flags they repeat the originals with the released weights; flags choose another model, picture or request. Other
models get the same requests through their own tasks (describe, ask, draw, edit), because they were tuned on other
sentences.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seed_multimodal.commands.common import add_common, cat_picture, load_system, save_picture
from seed_multimodal.entry import DONE, SOME_FAILED, add_quantization, log_line, run_program
from seed_multimodal.errors import CheckpointError
from seed_multimodal.language.tasks import DEMO_QUESTIONS

QUESTION, DRAWING, EDITING = DEMO_QUESTIONS
DRAWING_WORDS = "a dog on the green grass"


def tokenizer_script(argv: Sequence[str] | None = None) -> int:
    """`scripts/seed_tokenizer_inference.py`: picture → 32 codes → picture."""
    parser = _parser("seed_tokenizer_inference.py", "A picture becomes 32 codes and a picture again.", "cat.jpg")
    add_quantization(parser)  # of the model that answers --prompt
    return run_program(parser, _round_trip, argv)


def llama_script(size: str, argv: Sequence[str] | None = None) -> int:
    """`scripts/seed_llama_inference_{8B,14B}.py`: a question about a picture, a drawing, an edit.

    Args:
        size: "8b" or "14b": the meaning of `--model released`.
    """
    parser = _parser(f"seed_llama_inference_{size.upper()}.py",
                     f"SEED-LLaMA {size.upper()} answers a question about a picture, draws, and edits.", ".")
    add_quantization(parser)
    return run_program(parser, lambda args: _demonstrate(args, size), argv)


def require(names: Sequence[str]) -> None:
    """Refuse in one sentence when released parts are missing: what to download, where to put it, what runs now.

    Raises:
        CheckpointError: at least one of `names` (keys of `hub.PARTS`) is not on disk.
    """
    from seed_multimodal.hub import PARTS, local_folder, not_on_disk

    missing = [(name, PARTS[name].folder) for name in names if local_folder(PARTS[name].folder) is None]
    if missing:
        raise CheckpointError(f"{not_on_disk(missing)}, or use `--model nano`, which runs now.")


def _parser(program: str, text: str, out: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=program, description=text)
    parser.add_argument("--image", metavar="PICTURE", help="default: images/cat.jpg")
    parser.add_argument("--prompt", metavar="TEXT", help="ask this instead (about --image, if one is given)")
    parser.add_argument("--out", default=out, metavar="PATH", help="where pictures are saved (default: %(default)s)")
    add_common(parser, model="released", debug=False)
    return parser


def _round_trip(args: argparse.Namespace) -> int:
    from seed_multimodal.commands.pictures import load_codec

    if args.model in ("released", "8b", "14b"):
        require(["tokenizer", "unclip"])
    codec = load_codec(args)
    codes = codec.tokenize(args.image or cat_picture())
    print(" ".join(map(str, codes[0].tolist())))
    target = Path(args.out)
    print(save_picture(codec.draw(codes, seed=args.seed)[0], target if target.suffix else target / "cat.jpg"))
    if args.prompt:
        args.model = "8b" if args.model == "released" else args.model
        system = load_system(args)
        print(system.ask(codes[0].tolist(), args.prompt, seed=args.seed))
    return DONE


def _demonstrate(args: argparse.Namespace, size: str) -> int:
    args.model = size if args.model == "released" else args.model
    released = args.model in ("8b", "14b")
    if released:
        require(["tokenizer", args.model, "unclip"])
    system = load_system(args)
    if args.prompt or args.image:
        content: list[Any] = [Path(args.image)] if args.image else []
        content.append(args.prompt or QUESTION)
        return _answer(system, content, args, _target(args.out, "answer.jpg"), expected=False)
    cat = cat_picture()
    if not released:
        print(system.ask(cat, QUESTION, seed=args.seed))
        print(save_picture(system.draw(DRAWING_WORDS, seed=args.seed), _target(args.out, "dog.jpg")))
        print(save_picture(system.edit(cat, EDITING, seed=args.seed), _target(args.out, "cat_sunglasses.jpg")))
        return DONE
    _answer(system, [cat, QUESTION], args, _target(args.out, "answer.jpg"), expected=False)
    codes = [_answer(system, [DRAWING], args, _target(args.out, "dog.jpg"), expected=True),
             _answer(system, [cat, EDITING], args, _target(args.out, "cat_sunglasses.jpg"), expected=True)]
    return max(codes)


def _target(out: str, name: str) -> Path:
    """`--out` names a folder, or the file itself when only one picture can come."""
    return Path(out) if Path(out).suffix else Path(out) / name


def _answer(system: Any, content: list[Any], args: argparse.Namespace, target: Path, expected: bool) -> int:
    """One request: print its texts in order, save its pictures (`dog.jpg`, `dog_2.jpg`, …)."""
    answer = system.chat([{"role": "user", "content": content}], seed=args.seed)
    drawn = 0
    for part in answer.parts:
        if hasattr(part, "text"):
            print(part.text)
        elif hasattr(part, "codes"):
            drawn += 1
            if part.image is None:
                continue
            path = target if drawn == 1 else target.with_stem(f"{target.stem}_{drawn}")
            print(save_picture(part.image, path))
        else:
            log_line(f"a picture of this answer is broken: {part.reason}")
    if expected and not drawn:
        log_line(f"the answer to {content[-1]!r} holds no picture: try another --seed.")
        return SOME_FAILED
    return DONE


