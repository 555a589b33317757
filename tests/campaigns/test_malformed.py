"""The campaign of bad and hostile inputs (`tests/malformed`), short and long."""

import logging

import pytest
from malformed import REFUSED, SKIPPED, WORKS, Kind, campaign
from malformed.table import KINDS


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """The log would have a line an input."""
    monkeypatch.setattr(logging.getLogger("vtfast"), "disabled", True)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_input_works_is_skipped_or_is_refused(kind: Kind):
    ended = campaign(kind)
    assert set(ended) <= {WORKS, SKIPPED, REFUSED}
    assert ended[REFUSED] + ended[SKIPPED] or kind.name == "runs: report"  # which has notes instead
    assert ended.total() >= kind.count // 3  # different ones


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_ten_times_as_many(kind: Kind):
    campaign(kind, 10)


def test_the_short_campaign_is_long_enough():
    assert sum(kind.count for kind in KINDS) >= 600
