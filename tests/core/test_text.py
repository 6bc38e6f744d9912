"""Text for readers."""

from __future__ import annotations

import pytest

from fedlab.core.text import counted


@pytest.mark.parametrize("number, text", [(0, "0 sites"), (1, "1 site"), (2, "2 sites"), (1000, "1000 sites")])
def test_a_number_agrees_with_its_noun(number: int, text: str) -> None:
    assert counted(number, "site") == text
