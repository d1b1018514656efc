"""Whole renders that are kept: a change of the chart shows in them what it changes."""

import pytest

from tests.chart.golden_cases import CASES, FOLDER, golden_text


@pytest.mark.parametrize("name", CASES)
def test_renders_as_kept(name: str) -> None:
    assert golden_text(CASES[name]) == (FOLDER / f"{name}.yaml").read_text(), "look at it, then: make chart-golden"


def test_every_kept_render_has_a_case() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == set(CASES)
