"""Settings that cannot work are refused before the first round, with the reason, for every engine."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cohorts import blob_sites
from fedlab.engines import NVFlare, Processes
from fedlab.faults.sites import Faulty
from fedlab.privacy import DPSGD, AtSites, CentralGaussian, LocalGaussian, Privacy, Terms
from fedlab.run.admission import Admission
from fedlab.run.federate import federate, make_run
from fedlab.run.local import Local
from fedlab.strategies import FedAvg
from trainers import trainer

ENGINES = [Local(), Processes(workers=1), Faulty(engine=Local(), faults=[]), NVFlare()]
NOISE = dict(clip=1.0, noise_multiplier=1.0, delta=1e-3)


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: type(engine).__name__)
@pytest.mark.parametrize("privacy", [LocalGaussian(**NOISE), CentralGaussian(**NOISE)], ids=lambda p: type(p).__name__)
def test_a_deadline_under_a_guarantee(engine, privacy):
    """The time of a site is withheld, so that the deadline would never apply."""
    parts = dict(privacy=privacy, strategy=FedAvg(weights="uniform"), engine=engine)
    with pytest.raises(ValueError, match=r"no guarantee covers the time.*leave deadline out"):
        make_run(trainer(), blob_sites(), admission=Admission(deadline=60.0), **parts)
    assert make_run(trainer(), blob_sites(), admission=Admission(), **parts).guarded
    assert not make_run(trainer(), blob_sites(), admission=Admission(deadline=60.0), engine=engine).guarded


class Own(Privacy):
    """Noise with terms of its own, as in notebook 04."""

    units = frozenset({"site"})

    def __init__(self, **terms):
        self.terms = Terms(**{"unit": "site", "delta": 1e-3, "adjacency": "any two updates of a site", **terms})


class OwnAtServer(Own):
    units = frozenset()

    def release(self, mean, cohort, state, rng):
        return mean


LOCAL = LocalGaussian(**NOISE)


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: type(engine).__name__)
@pytest.mark.parametrize("one, other", [
    (LOCAL, LocalGaussian(**NOISE | {"delta": 2e-3})), (LOCAL, LocalGaussian(**NOISE, accountant="gdp")),
    (LOCAL, AtSites(sites=("site-1",), technique=LocalGaussian(**NOISE, accountant="gdp"))),
    (Own(delta=2e-3), LOCAL), (Own(adjacency="one voxel"), LOCAL),
    (OwnAtServer(), OwnAtServer(accountant="gdp"))])
def test_two_guarantees_that_cannot_be_added_up(one, other, engine):
    with pytest.raises(ValueError, match="cannot be added up; use the same δ, adjacency and accountant"):
        make_run(trainer(), blob_sites(), privacy=one + other, strategy=FedAvg(weights="uniform"), engine=engine)


@pytest.mark.parametrize("joined", [
    LOCAL + LocalGaussian(**NOISE), Own() + LOCAL, Own(delta=2e-3) + OwnAtServer(), LOCAL + CentralGaussian(**NOISE),
    LOCAL + DPSGD(**NOISE | {"delta": 0.1}, batch=1)], ids=repr)
def test_guarantees_that_can(joined):
    assert make_run(trainer(), blob_sites(), privacy=joined, strategy=FedAvg(weights="uniform")).guarded


@pytest.mark.parametrize("own", [Own, OwnAtServer])
def test_a_delta_that_giving_one_site_away_would_satisfy(own):
    with pytest.raises(ValueError, match=r"below 1 over the number of sites \(1/2\), got 0\.5"):
        make_run(trainer(), blob_sites(), privacy=own(delta=0.5), strategy=FedAvg(weights="uniform"))
    assert make_run(trainer(), blob_sites(), privacy=own(delta=0.49), strategy=FedAvg(weights="uniform"))


@pytest.mark.parametrize("name, said", [
    ("s" * 300, "1 to 200 characters, since files are named after it.*300 characters"), ("", "1 to 200 characters"),
    ("ä" * 40, "count as three or more")])
@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: type(engine).__name__)
def test_a_name_that_no_file_can_have(engine, name, said):
    sites = [replace(blob_sites()[0], name=name)]
    with pytest.raises(ValueError, match=said):
        make_run(trainer(), sites, engine=engine)


def test_the_longest_name_works(tmp_path):
    sites = [replace(site, name=letter * 200) for site, letter in zip(blob_sites(), "ab", strict=True)]
    parts = dict(privacy=LocalGaussian(**NOISE), engine=Local(ledgers=tmp_path / "ledgers"), rounds=2, progress=False)
    history = federate(trainer(), sites, checkpoint=tmp_path / "run", **parts)
    assert len(history.records) == 2 and history.site_states["b" * 200].updates == 2
