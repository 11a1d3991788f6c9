"""How a step is divided into rows and micro-steps."""

from __future__ import annotations

import pytest

from seed_multimodal.training.llm.step_plan import split_rows


@pytest.mark.parametrize(("asked", "fitting", "found"), [
    ((12, 4), 12, (12, 4)), ((12, 4), 100, (12, 4)),  # it fits
    ((12, 4), 8, (8, 6)), ((12, 4), 11, (8, 6)), ((12, 4), 5, (4, 12)), ((12, 1), 1, (1, 12)),  # the same rows
    ((11, 1), 5, (5, 2)), ((7, 1), 4, (4, 2)), ((13, 1), 12, (12, 1)),  # as near as it can be
    ((12, 4), 0, (1, 48))])
def test_rows_that_do_not_fit_become_micro_steps(asked: tuple[int, int], fitting: int, found: tuple[int, int]) -> None:
    assert split_rows(*asked, fitting) == found


def test_the_rows_of_a_step_stay_what_they_are_asked_to_be() -> None:
    for rows in range(1, 40):
        for accumulate in (1, 2, 4):
            for fitting in range(1, rows + 2):
                found = split_rows(rows, accumulate, fitting)
                whole = rows * accumulate
                assert found[0] <= fitting or found == (rows, accumulate)
                assert abs(found[0] * found[1] - whole) <= max(1, whole / 8), (rows, accumulate, fitting, found)
