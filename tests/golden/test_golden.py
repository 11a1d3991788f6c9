"""The library agrees with every golden fixture; the runner's own functions."""

import pytest
from runner import assert_close, check_fixture, fixture_folders


@pytest.mark.process
@pytest.mark.slow
def test_fixture(golden_folder):
    check_fixture(golden_folder)


def test_fixture_folders_of_an_empty_folder(tmp_path):
    with pytest.raises(ValueError):
        fixture_folders(tmp_path)


def test_assert_close_of_other_shapes_values_and_nan():
    assert_close([1.0, 2.0], [1.0, 2.01], atol=0.02)
    for actual, expected, message in (
        ([1.0], [1.0, 2.0], "shape"),
        ([1.0, 2.0], [1.0, 3.0], "element 1"),
        ([float("nan")], [1.0], "not finite"),
    ):
        with pytest.raises(AssertionError, match=message):
            assert_close(actual, expected, atol=0.5)
