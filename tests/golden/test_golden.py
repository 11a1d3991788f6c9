"""Every golden fixture folder agrees with the library, and the runner itself refuses what it does not know."""

from __future__ import annotations

from pathlib import Path

import pytest
from runner import assert_close, fixture_folders, kind_of, load_kinds, run_fixture


@pytest.mark.process
@pytest.mark.slow
def test_fixture(golden_folder: Path) -> None:
    run_fixture(golden_folder)


def test_unknown_kind_fails_with_a_sentence(tmp_path: Path) -> None:
    folder = tmp_path / "never_heard_of"
    folder.mkdir()
    with pytest.raises(AssertionError, match="never_heard_of: no module in tests/golden/kinds"):
        run_fixture(folder)


def test_longest_prefix_wins() -> None:
    kinds = {"stage2_losses": print, "stage2_losses_image_down": print}
    assert kind_of(Path("stage2_losses_image_down_b"), kinds) == "stage2_losses_image_down"
    assert kind_of(Path("stage2_losses_b"), kinds) == "stage2_losses"


def test_empty_or_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no fixture folder"):
        fixture_folders(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        fixture_folders(tmp_path / "absent")


def test_kind_module_without_check_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "half.py").write_text("KIND = 'half'\n")
    with pytest.raises(ValueError, match=r"half\.py: a kind module needs KIND"):
        load_kinds(tmp_path)


def test_assert_close_sees_shape_value_and_nan() -> None:
    assert_close([1.0, 2.0], [1.0, 2.01], atol=0.02)
    with pytest.raises(AssertionError, match="shape"):
        assert_close([1.0], [1.0, 2.0], atol=1)
    with pytest.raises(AssertionError, match="element 1"):
        assert_close([1.0, 2.0], [1.0, 3.0], atol=0.5)
    with pytest.raises(AssertionError, match="not finite"):
        assert_close([float("nan")], [1.0], atol=9)
