"""Golden fixtures: recorded inputs and outputs of the released programs, one folder per fixture.

How to run:

    pytest tests/golden                          # the fixtures kept in tests/golden/data
    pytest tests/golden --golden-dir DIR         # every fixture folder in DIR
    pytest tests/golden -k preprocessing         # one kind

How it works: each folder in DIR is one test item. The folder's name starts with its kind (`seed2_tokenizer_q8` is of
kind `seed2_tokenizer`), a kind is one module `tests/golden/kinds/<name>.py`:

    KIND = "seed2_tokenizer"                     # a prefix of folder names; the longest matching prefix wins

    def check(folder: Path) -> None:             # raises AssertionError when the library disagrees with the fixture
        case = read_json(folder / "config.json")
        ...

A folder whose kind no module knows fails. A check derives every size from the fixture itself, because further
fixtures of the same kind come with other sizes and seeds. Its docstring names the parts of the fixture it leaves out.
Helpers for checks (`from runner import …`): `read_json`, `read_json_lines`, `files_named`, `read_tensors`,
`assert_close`, `assert_same`, `golden_tokenizer_folder`. Large json of the kept fixtures is stored compressed
(`x.json.gz`); checks ask for `x.json` and get either.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DEFAULT_DIR = HERE / "data"
Check = Callable[[Path], None]


def fixture_folders(directory: Path) -> list[Path]:
    """Every fixture folder directly inside `directory`, sorted; raises ValueError when there is none."""
    if not directory.is_dir():
        raise ValueError(f"--golden-dir {directory}: there is no such folder.")
    folders = sorted(p for p in directory.iterdir() if p.is_dir() and p.name[0] not in "._")
    if not folders:
        raise ValueError(f"--golden-dir {directory}: there is no fixture folder in it.")
    return folders


def load_kinds(directory: Path = HERE / "kinds") -> dict[str, Check]:
    """Read every module in `kinds/` -> {kind: check}; two modules claiming one kind are an error."""
    kinds: dict[str, Check] = {}
    for file in sorted(directory.glob("*.py")):
        if file.name == "__init__.py":
            continue
        module = _load_module(f"golden_kind_{file.stem}", file)
        kind = getattr(module, "KIND", None)
        if not isinstance(kind, str) or not kind or not callable(getattr(module, "check", None)):
            raise ValueError(f"{file}: a kind module needs KIND = '...' and check(folder).")
        if kind in kinds:
            raise ValueError(f"{file}: kind {kind!r} is already taken by another module.")
        kinds[kind] = module.check
    return kinds


def _load_module(name: str, file: Path) -> Any:
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses in the module look it up by name
    spec.loader.exec_module(module)
    return module


def kind_of(folder: Path, kinds: dict[str, Check]) -> str:
    """The longest kind that starts the folder's name; AssertionError when there is none."""
    matches = [kind for kind in kinds if folder.name.startswith(kind)]
    if not matches:
        raise AssertionError(
            f"{folder.name}: no module in tests/golden/kinds checks fixtures of this kind "
            f"(known kinds: {', '.join(sorted(kinds)) or 'none'}).")
    return max(matches, key=len)


def run_fixture(folder: Path) -> None:
    """Check one fixture folder with the module of its kind."""
    kinds = load_kinds()
    kinds[kind_of(folder, kinds)](folder)


def read_text(path: Path) -> str:
    """A text file of a fixture, or what `<name>.gz` holds; a sentence instead of a traceback when neither is there."""
    packed = path.with_name(path.name + ".gz")
    assert path.is_file() or packed.is_file(), f"{path}: the fixture lacks this file."
    data = path.read_bytes() if path.is_file() else gzip.decompress(packed.read_bytes())
    return data.decode("utf-8")


def read_json(path: Path) -> Any:
    """A json file of a fixture, compressed or not."""
    return json.loads(read_text(path))


def read_json_lines(path: Path) -> list[Any]:
    """A file with one json value per line, compressed or not."""
    return [json.loads(line) for line in read_text(path).splitlines() if line.strip()]


def files_named(folder: Path, pattern: str) -> list[Path]:
    """Files that match, sorted, by their names without `.gz`; for `read_json` and its like."""
    plain = set(folder.glob(pattern)) | {path.with_name(path.name[:-3]) for path in folder.glob(pattern + ".gz")}
    return sorted(plain)


def read_tensors(path: Path) -> dict[str, Any]:
    """A safetensors file of a fixture -> {name: torch.Tensor} on CPU."""
    from safetensors.torch import load_file

    assert path.is_file(), f"{path}: the fixture lacks this file."
    return load_file(path)


def assert_close(actual: Any, expected: Any, atol: float, rtol: float = 0.0, what: str = "tensor") -> None:
    """Same shape and |actual - expected| <= atol + rtol * |expected| everywhere; names `what` and the worst element."""
    import torch

    got, want = torch.as_tensor(actual).double().cpu(), torch.as_tensor(expected).double().cpu()
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    if got.numel() == 0:
        return
    assert torch.isfinite(got).eq(torch.isfinite(want)).all(), f"{what}: not finite in other places than expected"
    excess = (got - want).abs().nan_to_num() - (atol + rtol * want.abs().nan_to_num())
    worst = int(excess.argmax())
    assert excess.max() <= 0, (
        f"{what}: element {worst} is {got.flatten()[worst]:.6g}, expected {want.flatten()[worst]:.6g} "
        f"(atol {atol:g}, rtol {rtol:g}; {int((excess > 0).sum())} of {got.numel()} elements are off)")


def assert_same(actual: Any, expected: Any, what: str) -> None:
    """Exact equality of plain Python values; shows both, cut to a readable length."""
    assert actual == expected, f"{what}:\n  got      {str(actual)[:1500]!r}\n  expected {str(expected)[:1500]!r}"


def golden_tokenizer_folder(folder: Path) -> Path:
    """The tokenizer folder a fixture was recorded with: in an `llm_sequences*` fixture beside it, else the kept one."""
    for place in (folder, *sorted(folder.parent.glob("llm_sequences*"))):
        if (place / "tokenizer" / "tokenizer.model").is_file():
            return place / "tokenizer"
    return DEFAULT_DIR / "llm_sequences" / "tokenizer"
