"""check_privacy() refuses techniques with one plausible mistake and no right one, however suspicious it looks.

A part of mistakes.py and unseen_mistakes.py in each run of the tests; benchmarks/check_privacy.py tries all of the
first, and fedlab's own techniques with random settings.
"""

from __future__ import annotations

import numpy as np
import pytest
from mistakes import RIGHT, WRONG
from unseen_mistakes import NAMED
from unseen_mistakes import WRONG as MORE_WRONG

from cohorts import TinyNet, blob_patient
from fedlab.checks.check_report import CheckReport
from fedlab.checks.noise_tests import only_shifted
from fedlab.checks.privacy import check_privacy
from fedlab.checks.small_runs import plain_descent
from fedlab.core.types import Site
from fedlab.privacy.base import Privacy
from trainers import trainer

#: One in so many is tried.
PART = 5


def small(technique: Privacy) -> CheckReport:
    cohort = [Site(f"site-{k}", [blob_patient(f"s{k}p{i}", seed=10 * k + i, shape=(12, 12, 12)) for i in range(6)])
              for k in range(2)]
    one = trainer(model=TinyNet(), lr=1.0, steps=1, crop=(12, 12, 12), optimiser=plain_descent)
    return check_privacy(technique, trainer=one, sites=cohort, raise_=False)


@pytest.mark.parametrize("technique", [*WRONG, *MORE_WRONG][::-PART], ids=repr)
def test_a_mistake_is_found(technique):
    report = small(technique)
    assert report.failed, str(report)


@pytest.mark.parametrize(("technique", "check"), NAMED, ids=repr)
def test_a_mistake_is_named(technique, check):
    report = small(technique)
    assert report.failed == (check,), str(report)


@pytest.mark.parametrize("technique", RIGHT[1::4], ids=repr)
def test_a_right_technique_passes(technique):
    report = small(technique)
    assert not report.failed, str(report)


def test_an_output_that_no_update_shifts_shows_no_law_of_noise():
    # As of a sparse vector all of whose values are cut off at the clip.
    cut = np.random.default_rng(0).choice([-1.0, 1.0], (48, 30))
    assert not only_shifted(np.zeros((2, 30)), cut) and only_shifted(np.ones((2, 30)), cut)
