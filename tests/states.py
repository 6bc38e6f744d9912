"""What the sites of a run keep, put together by hand."""

from __future__ import annotations

from collections.abc import Mapping

from fedlab.core.types import SiteState
from fedlab.run.site_states import SiteStates


def copies(states: Mapping[str, SiteState]) -> dict[str, SiteState]:
    """The states as they are now, which no later round changes."""
    return {site: states[site] for site in states}


def kept_as(states: Mapping[str, SiteState]) -> SiteStates:
    """A run's record of these states."""
    record = SiteStates()
    for site, state in states.items():
        record.save(site, state)
    return record
