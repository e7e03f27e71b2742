"""docs/errors.md is what the code raises."""

from __future__ import annotations

import pytest

from tests.errors.table import PAGE, page, sites

pytestmark = pytest.mark.contract


def test_the_committed_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: make errors"


def test_the_table_reads_the_code() -> None:
    """A message written out, and one that a helper makes of what its caller says."""
    said = {site.what for site in sites()}
    assert "cannot read {word}" in said
    assert len(said) > 200
