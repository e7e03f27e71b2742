"""Every error of docs/errors.md is raised by a test. Runs last, and only where all of them have run."""

from __future__ import annotations

import pytest

from tests.errors.raised import unraised

pytestmark = pytest.mark.contract


def test_every_error_is_raised_by_a_test(request: pytest.FixtureRequest) -> None:
    options = request.config.option
    if request.config.args != ["tests"] or options.keyword or options.deselect or options.ignore:
        pytest.skip("needs the whole suite")
    missing = unraised()
    assert not missing, f"{len(missing)} errors without a test:\n" + "\n".join(map(str, missing))
