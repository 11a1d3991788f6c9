"""The documentation's site: a strict build, no requests to other hosts, commands that the parser
accepts, and packages as the pages write them."""

import ast
import re
import runpy
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from data_files import jpeg, write, write_any
from installed_package import install
from llm_runs import environment
from random_images import noise
from real_processes import run_checked
from repository import ROOT
from tiny import read_json

from seed_multimodal.cli.main import build_parser, main
from seed_multimodal.data.formats.contents import registered_formats
from seed_multimodal.rl.config import RewardSettings
from seed_multimodal.rl.rewards import open_reward

HOW_TO = sorted((ROOT / "docs" / "how-to").glob("*.md"))

LOADED = re.compile(
    r"<(?:(?:script|img|iframe|source)[^>]*\ssrc|link[^>]*\shref)=\"?(https?:[^\s\">]+)"
    r"|url\(\"?(https?:[^)]+)"
)


@pytest.mark.process
@pytest.mark.nightly
def test_build_strict_makes_every_page_without_other_hosts(tmp_path):
    # `--strict` fails on broken links and anchors.
    site = tmp_path / "site"
    run_checked(
        f"{sys.executable} -m mkdocs build --strict --site-dir {site}".split(),
        cwd=ROOT,
        env=environment(),
    )
    sources = [page.relative_to(ROOT / "docs") for page in (ROOT / "docs").rglob("*.md")]
    assert all((site / page.with_suffix(".html")).is_file() for page in sources)

    # The reference pages are made of the code.
    for page, name in (
        ("cli", "--guidance-scale"),
        ("training", "gradient_accumulation_steps"),
        ("python", "from_pretrained"),
        ("http", "ignored"),
    ):
        assert name in (site / "reference" / f"{page}.html").read_text(encoding="utf-8")

    # A reader's browser asks no other host.
    files = [*site.rglob("*.html"), *site.rglob("*.css")]
    loaded = {file.name: LOADED.findall(file.read_text(encoding="utf-8")) for file in files}
    assert {name: links for name, links in loaded.items() if links} == {}


def documented_commands() -> list[list[str]]:
    """Each `seed` command of the pages' code blocks, as words."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), ROOT / "pretrained" / "README.md"]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages).replace("\\\n", " ")
    lines = [
        line.strip()
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
        for line in block.splitlines()
    ]
    return [
        shlex.split(line, comments=True)[1:]
        for line in lines
        if line.startswith("seed ") and "…" not in line
    ]


def test_documented_commands_are_understood(capsys):
    """The flags and arguments of every documented `seed` command."""
    parser = build_parser()
    unknown = []
    for argv in documented_commands():
        try:
            parser.parse_args(argv)
        except SystemExit:
            unknown.append((argv, capsys.readouterr().err.splitlines()[-1]))
    assert len(documented_commands()) > 30 and not unknown


# ---- blocks of Python and TOML


def blocks(page: Path, language) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("page", HOW_TO, ids=lambda page: page.stem)
def test_python_blocks_import_what_exists(page, tmp_path):
    # Most of them need weights; what they import must be there.
    for block in blocks(page, "python"):
        tree = ast.parse(block)  # no page has code that cannot be pasted
        imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        runpy.run_path(str(write(tmp_path / "imports.py", ast.unparse(ast.Module(imports, [])))))


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """The packages of all pages, installed; the working folder."""
    monkeypatch.chdir(tmp_path)
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)
    for number, page in enumerate(HOW_TO):
        for block in blocks(page, "python"):
            name = re.match(r"# (my_package\S*\.py)\n", block)
            if name:
                # The page of rewards has a module, the others a package.
                file = name[1].replace("my_package.py", "my_package/__init__.py")
                write(site / file, block)
        groups: dict[str, dict[str, str]] = {}
        for block in blocks(page, "toml"):
            groups |= tomllib.loads(block).get("project", {}).get("entry-points", {})
        if "mosaic" not in str(groups):  # tests/contract has this one
            install(site, f"page{number}", groups)
    registered_formats.cache_clear()
    yield tmp_path
    registered_formats.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_package"]:
        del sys.modules[name]


def test_a_format_as_its_page_writes_it(packages, capsys):
    # Whoever pastes the page's package trains on it with the page's command.
    for index in range(3):
        write(packages / f"pages/de/{index}.txt", f"a fox {index}")
        write(packages / f"pages/de/{index}.png", jpeg(index))
    [command] = [argv for argv in documented_commands() if "mine" in argv]
    argv = [str(ROOT / word) if word.startswith("pretrained") else word for word in command]
    assert main(argv) == 0
    assert "3 of 3 records, 3 sequences" in capsys.readouterr().out
    # What it lacks is named.
    module = packages / "site/my_package/records.py"
    write(module, module.read_text().replace("self.path = path", "pass"))
    del sys.modules["my_package.records"]
    assert main(argv) == 2
    assert "'path'" in capsys.readouterr().err


def test_a_benchmark_as_its_page_writes_it(packages, tiny_folder, capsys):
    answers = {1: "two", 2: "3", 3: "none"}
    question = {"image": "a.jpg", "question": "How many?"}
    rows = [{**question, "question_id": key, "answer": 2} for key in answers]
    write_any(packages / "q.json", rows)
    lines = [{"id": key, "answer": answer} for key, answer in answers.items()]
    write_any(packages / "out/samples-0.jsonl", lines)
    flags = f"--questions q.json --out out --device cpu --model {tiny_folder}".split()
    assert main(["eval", "numbers", *flags, "--tolerance", "1"]) == 0
    assert read_json(packages / "out/summary.json")["accuracy"]["value"] == 0.6667
    # Only scores depend on the tolerance.
    assert main(["eval", "numbers", *flags]) == 0
    assert read_json(packages / "out/summary.json")["accuracy"]["value"] == 0.3333

    # A package that is broken, or none of a benchmark, leaves the other commands usable.
    write(packages / "site/my_package/wrong.py", "1 / 0")
    numbers = packages / "site/my_package/numbers.py"
    write(numbers.with_name("flag.py"), numbers.read_text().replace("tolerance:", "model:"))
    entries = {
        "gone": "my_package.gone:Gone",
        "wrong": "my_package.wrong:Wrong",
        "flag": "my_package.flag:Numbers",
        "path": "pathlib:Path",
        "plain": "seed_multimodal.evaluation.benchmark:Benchmark",
        **dict.fromkeys(("vqa", "suite"), "my_package.numbers:Numbers"),
    }
    install(packages / "site", "broken", {"seed_multimodal.benchmarks": entries})
    build_parser().parse_args(["eval", "vqa", *flags])
    error = capsys.readouterr().err
    assert "my_package.gone" in error and "pathlib:Path" in error


def test_a_reward_as_its_page_writes_it(packages):
    records = [{"least": 0}, {"least": 300}]
    reward = open_reward(RewardSettings("mine", ""), records, torch.device("cpu"))
    assert reward([noise(0)] * 2, records) == [1.0, 0.0]
