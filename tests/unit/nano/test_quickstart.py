"""The quickstart's sheet, images and JSON, on a tiny random system."""

import pytest
from PIL import Image
from tiny import read_json

from seed_nano import quickstart
from seed_nano.world.splits import held_out
from seed_nano.world.words import scene_of


@pytest.mark.process
@pytest.mark.slow
def test_quickstart_writes_sheets_images_and_json(tiny_folder, tmp_path, capsys):
    # The README's first program.
    out = tmp_path / "quick"
    assert quickstart.main(f"--model {tiny_folder} --out {out} --device cpu".split()) == 0
    result = read_json(out / "quickstart.json")
    assert [len(codes) for codes in result["codes"]] == [32] * len(quickstart.QUESTIONS_BY_CAPTION)
    assert [cell["request"] for cell in result["draw"]] == list(quickstart.DRAW_CAPTIONS)
    assert [cell["request"] for cell in result["talk"] if cell["request"]] == list(quickstart.CHAT)
    for name in ("look", "draw", "edit", "grow"):
        for index in range(len(result[name])):
            assert (out / f"{name}_{index + 1}.png").is_file()
    assert Image.open(out / "contact_sheet.png").width > 1000
    assert "contact_sheet.png" in capsys.readouterr().out


def test_scenes_of_the_sheet_are_held_out():
    assert all(held_out(scene_of(caption)) for caption in quickstart.QUESTIONS_BY_CAPTION)
