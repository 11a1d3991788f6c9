"""Golden fixtures: recorded inputs and outputs of the original programs, one folder per fixture.

    pytest tests/golden                          # the fixtures in tests/golden/data
    pytest tests/golden --golden-dir DIR         # every fixture folder in DIR
    pytest tests/golden -k preprocessing         # one kind

Each folder in DIR is one test. Its name starts with its kind (`seed2_tokenizer_q8` is of kind
`seed2_tokenizer`). A module of `tests/golden/kinds` has a table `KINDS` of kinds and their
functions `check(folder)`, which raise AssertionError if the library disagrees. A check derives
every size from the fixture, because further fixtures of a kind have other sizes and seeds; the
module's docstring lists what is not compared. Large json files in tests/golden/data are compressed
(`x.json.gz`); the functions below read `x.json` or `x.json.gz`.
"""

from __future__ import annotations

import functools
import gzip
import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DEFAULT_DIR = HERE / "data"
Check = Callable[[Path], None]


def fixture_folders(directory: Path) -> list[Path]:
    """Every fixture folder directly inside `directory`, sorted; raises ValueError when there is
    none."""
    folders = sorted(p for p in directory.glob("*") if p.is_dir() and p.name[0] not in "._")
    if not folders:
        raise ValueError(f"--golden-dir {directory}: there is no fixture folder in it.")
    return folders


@functools.cache
def load_kinds() -> dict[str, Check]:
    """Kind → its check, from every module in `kinds/`."""
    modules = [
        importlib.import_module(f"kinds.{file.stem}")
        for file in sorted((HERE / "kinds").glob("*.py"))
    ]
    return {kind: check for module in modules for kind, check in module.KINDS.items()}


def kind_of(folder: Path, kinds: Mapping[str, Check]) -> str:
    """The longest kind that starts the folder's name; AssertionError when there is none."""
    matches = [kind for kind in kinds if folder.name.startswith(kind)]
    assert matches, (
        f"{folder.name}: no module in tests/golden/kinds checks this kind "
        f"({', '.join(sorted(kinds))})."
    )
    return max(matches, key=len)


# ---- files of a fixture


def read_text(path: Path) -> str:
    """A text file of a fixture, compressed or not."""
    packed = path.with_name(path.name + ".gz")
    assert path.is_file() or packed.is_file(), f"{path}: the fixture lacks this file."
    data = path.read_bytes() if path.is_file() else gzip.decompress(packed.read_bytes())
    return data.decode("utf-8")


def read_json(path: Path) -> Any:
    """A json file, compressed or not."""
    return json.loads(read_text(path))


def read_json_lines(path: Path) -> list[Any]:
    """A file with one json value per line, compressed or not; not empty."""
    values = [json.loads(line) for line in read_text(path).splitlines() if line.strip()]
    assert values, f"{path}: the fixture holds no cases."
    return values


def files_named(folder: Path, pattern: str) -> list[Path]:
    """Files that match, sorted, by their names without `.gz`; not none."""
    files = set(folder.glob(pattern)) | {
        path.with_name(path.name[:-3]) for path in folder.glob(pattern + ".gz")
    }
    assert files, f"{folder}: the fixture has no {pattern}."
    return sorted(files)


def read_tensors(path: Path) -> dict[str, Any]:
    """A safetensors file → {name: tensor} on the CPU."""
    from safetensors.torch import load_file

    assert path.is_file(), f"{path}: the fixture lacks this file."
    return load_file(path)


def read_case(folder: Path) -> tuple[Any, dict[str, Any], dict[str, Any], dict[str, Any]]:
    """`config.json`, and the tensors of weights, inputs and outputs."""
    weights, inputs, outputs = (
        read_tensors(folder / f"{name}.safetensors") for name in ("weights", "inputs", "outputs")
    )
    return read_json(folder / "config.json"), weights, inputs, outputs


def part(tensors: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The tensors whose names begin with `name.`, without this prefix."""
    return {
        key.removeprefix(f"{name}."): value
        for key, value in tensors.items()
        if key.startswith(f"{name}.")
    }


def golden_tokenizer_folder(folder: Path) -> Path:
    """The tokenizer of a fixture, of an `llm_sequences*` fixture next to it, or of
    tests/golden/data."""
    for candidate in (folder, *sorted(folder.parent.glob("llm_sequences*"))):
        if (candidate / "tokenizer" / "tokenizer.model").is_file():
            return candidate / "tokenizer"
    return DEFAULT_DIR / "llm_sequences" / "tokenizer"


# ---- comparisons


def assert_close(
    actual: Any, expected: Any, atol: float, rtol: float = 0.0, what: str = "tensor"
) -> None:
    """Same shape and |actual - expected| <= atol + rtol * |expected| everywhere; names `what` and
    the worst element."""
    import torch

    got = torch.as_tensor(actual).detach().double().cpu()
    want = torch.as_tensor(expected).double().cpu()
    assert got.shape == want.shape, (
        f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    )
    if got.numel() == 0:
        return
    assert torch.isfinite(got).eq(torch.isfinite(want)).all(), (
        f"{what}: not finite in other places than expected"
    )
    excess = (got - want).abs().nan_to_num() - (atol + rtol * want.abs().nan_to_num())
    worst = int(excess.argmax())
    assert excess.max() <= 0, (
        f"{what}: element {worst} is {got.flatten()[worst]:.6g}, expected "
        f"{want.flatten()[worst]:.6g} (atol {atol:g}, rtol {rtol:g}; "
        f"{int((excess > 0).sum())} of {got.numel()} elements are off)"
    )


def assert_all_close(
    actual: Mapping[str, Any],
    want: Mapping[str, Any],
    atol: float,
    rtol: float = 0.0,
    name: str = "{}",
) -> None:
    """`assert_close` of every value with the recorded tensor `name.format(key)`."""
    for key, value in actual.items():
        assert_close(value, want[name.format(key)], atol, rtol, name.format(key))


def assert_gradients(
    model: Any,
    want: Mapping[str, Any],
    norms: Mapping[str, float | None],
    atol: float = 1e-6,
    what: str = "",
) -> None:
    """Gradients by parameter (of large tables the first rows) and their norms; None: there is no
    gradient."""
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, value in want.items():
        assert_close(
            gradients[name][: len(value)] if value.ndim else gradients[name],
            value,
            atol,
            1e-3,
            f"{what}: gradient of {name}",
        )
    for name, norm in norms.items():
        assert_same(gradients[name] is None, norm is None, f"{what}: {name} has no gradient")
        if norm is not None:
            assert_close(
                gradients[name].norm(), norm, 1e-5, 1e-3, f"{what}: gradient norm of {name}"
            )


def assert_same(actual: Any, expected: Any, what: str) -> None:
    """Exact equality of plain Python values."""
    assert actual == expected, (
        f"{what}:\n  got      {str(actual)[:1500]!r}\n  expected {str(expected)[:1500]!r}"
    )
