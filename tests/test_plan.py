"""The order of the tests: nothing is left out, and what takes long begins early."""

from __future__ import annotations

import pytest

from tests.harness import ROOT
from tests.plan import LONG, MEASURED, PAGES, dealt


def test_the_files_it_names_are_there() -> None:
    there = {path.stem for path in (ROOT / "tests").glob("test_*.py")}
    assert set(LONG) | set(PAGES) | MEASURED <= there
    assert len({*LONG, *PAGES}) == len(LONG) + len(PAGES)


@pytest.mark.parametrize("hands", range(1, 7))
@pytest.mark.parametrize("short", [0, 3, 100])
def test_every_test_is_dealt_once_and_every_other_share_begins_with_a_long_file(hands: int, short: int) -> None:
    tests = [(f"short-{number // 4}", number) for number in range(short)]
    tests += [(name, number) for name in reversed(LONG[:6]) for number in range(5)]
    order = dealt(tests, lambda test: test[0], hands)
    assert sorted(order) == sorted(tests)
    if short == 100:
        starts, left = [0], len(tests)
        for hands_left in range(hands, 1, -1):  # as xdist cuts them
            starts.append(starts[-1] + left // hands_left)
            left -= left // hands_left
        assert [order[start][0] for start in starts[::2]] == LONG[:hands:2]
        assert not {order[start][0] for start in starts[1::2]} & set(LONG)


def test_the_first_share_begins_with_all_pages() -> None:
    tests = [(name, number) for name in ("short", *LONG, *PAGES) for number in range(5)]
    order = dealt(tests, lambda test: test[0], 4)
    assert order[: 5 * len(PAGES)] == [(name, number) for name in PAGES for number in range(5)]
    assert sorted(order) == sorted(tests)
