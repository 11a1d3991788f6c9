"""The sheets of the course: their blocks run in order, and end in a picture and two answers."""

import ast
import os
import re
import sys
from pathlib import Path

import pytest
from llm_runs import environment
from real_processes import run_checked
from repository import ROOT

SHEETS = sorted((ROOT / "docs" / "course").glob("[1-9]-*.md"))
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
MINUTES = 15


def program(sheet: Path) -> str:
    """The blocks of a sheet as one Python program; those of bash run where they stand."""
    lines = ["import subprocess"]
    for language, block in BLOCK.findall(sheet.read_text(encoding="utf-8")):
        if language == "bash":
            lines.append(f"subprocess.run(['bash', '-ec', {block!r}], check=True)")
        else:
            lines.append(block)
    return "\n".join(lines)


def test_course_has_seven_sheets_in_order():
    index = (ROOT / "docs" / "course" / "index.md").read_text(encoding="utf-8")
    linked = re.findall(r"\]\(([1-9]-[\w-]+\.md)\)", index)
    assert linked == [sheet.name for sheet in SHEETS]
    assert len(linked) == 7


@pytest.mark.parametrize("sheet", SHEETS, ids=lambda sheet: sheet.stem)
def test_sheet_parses_and_ends_in_a_picture_and_two_answers(sheet):
    text = sheet.read_text(encoding="utf-8")
    compile(program(sheet), sheet.name, "exec")
    assert f'"outputs/course/{sheet.stem}.png"' in text
    questions = text.partition("## Questions\n")[2].partition("<details")[0]
    assert re.findall(r"^(\d)\. .*\?$", questions, re.MULTILINE) == ["1", "2"]

    # The last block computes the answers and checks them.
    last = ast.parse(BLOCK.findall(text)[-1][1])
    names = {}
    for node in ast.walk(last):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            names[node.targets[0].id] = node.value
    assert len(names["answers"].keys) == 2
    assert any(isinstance(node, ast.Assert) for node in last.body)

    # Settings of microseed that exist.
    source = (ROOT / "microseed.py").read_text(encoding="utf-8")
    settings = set(re.findall(r"^(\w+) = ", source, re.MULTILINE))
    for language, block in BLOCK.findall(text):
        if language == "bash" and "microseed.py" in block:
            assert set(re.findall(r"(?<![-\w])(\w+)=[\w{]", block)) <= settings


@pytest.mark.nightly
@pytest.mark.process
@pytest.mark.timeout(60 * MINUTES * len(SHEETS))
def test_sheets_run_in_order_in_fifteen_minutes_each(tmp_path):
    # 1. A folder with everything of the repository but its outputs.
    for entry in ROOT.iterdir():
        if entry.name not in ("outputs", "log", ".git"):
            (tmp_path / entry.name).symlink_to(entry)

    # 2. The sheets load what earlier ones trained.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    variables = environment(PATH=path, MPLBACKEND="Agg")
    for sheet in SHEETS:
        script = tmp_path / f"{sheet.stem}.py"
        script.write_text(program(sheet), encoding="utf-8")
        command = [sys.executable, str(script)]
        run_checked(command, cwd=tmp_path, env=variables, timeout=60 * MINUTES)
        assert (tmp_path / "outputs" / "course" / f"{sheet.stem}.png").is_file()
