"""Several techniques in one run: each unit has its own ε, and what protects the same unit adds up in one ledger."""

from __future__ import annotations

import pytest

from cohorts import TinyNet, blob_sites
from fedlab.core.errors import PrivacyError
from fedlab.core.weights import trainable
from fedlab.privacy.accounting.ledger import Gaussian, epsilon_of
from fedlab.privacy.compression import TopK
from fedlab.privacy.dp.clipping import AdaptiveClip
from fedlab.privacy.dp.dpsgd import DPSGD
from fedlab.privacy.dp.site_level import CentralGaussian, LocalGaussian
from fedlab.privacy.sparse.partial_sharing import SparseVector
from fedlab.run.federate import each_round, federate
from fedlab.strategies import FedAvg
from trainers import trainer

STEPS = Gaussian(noise_multiplier=1.5, sample_rate=0.5, steps=2)


def patients(**changes) -> DPSGD:
    return DPSGD(**({"clip": 0.5, "noise_multiplier": 1.5, "sample_rate": 0.5, "delta": 1e-2} | changes))


def local(**changes) -> LocalGaussian:
    return LocalGaussian(**({"clip": 1.0, "noise_multiplier": 4.0, "delta": 1e-3} | changes))


def test_a_guarantee_per_patient_and_one_per_site_stand_side_by_side():
    history = federate(trainer(steps=2), blob_sites((3, 4)), privacy=patients() + TopK(keep=0.5) + local(), rounds=2,
                       progress=False)
    spent = history.spent().reset_index()
    assert len(spent) == 2 * 2 * 2  # rounds, sites, units
    for (unit, number), rows in spent.groupby(["unit", "round"]):
        releases, delta = {"patient": ([STEPS], 1e-2), "site": ([Gaussian(noise_multiplier=2.0)], 1e-3)}[unit]
        assert set(rows["epsilon"]) == {epsilon_of(releases * (number + 1), delta=delta)}
        assert set(rows["delta"]) == {delta}
    said = history.guarantee()
    assert ("per patient (zero-out: add or remove one patient's contribution; the number of patients is public, "
            "rdp accountant)" in said)
    assert "per site (any two updates of a site, rdp accountant)" in said
    from fedlab.view.report_page import privacy_section

    table = privacy_section(history).table
    assert {"ε per patient, site-0", "ε per site, site-0"} <= set(table.columns)


def test_patients_are_protected_at_the_site_and_sites_at_the_server():
    technique = patients() + CentralGaussian(clip=1.0, noise_multiplier=2.0, delta=1e-3)
    history = federate(trainer(steps=2), blob_sites((3, 4)), privacy=technique, rounds=2, progress=False,
                       strategy=FedAvg(weights="uniform"))
    last = history.spent().xs(1, level="round")["epsilon"].to_dict()
    assert last == {("site-0", "patient"): epsilon_of([STEPS] * 2, delta=1e-2),
                    ("site-1", "patient"): epsilon_of([STEPS] * 2, delta=1e-2),
                    ("server", "site"): epsilon_of([Gaussian(noise_multiplier=2.0)] * 2, delta=1e-3)}


def test_two_mechanisms_of_one_unit_add_up_in_one_ledger():
    sparse = SparseVector(fraction=0.1, epsilon=2.0, delta=1e-3)
    history = federate(trainer(), blob_sites((2, 2)), privacy=sparse + local(), rounds=2, progress=False)
    size = sum(t.numel() for t in trainable(TinyNet()).values())
    once = [*sparse.cost(size).releases(), Gaussian(noise_multiplier=2.0)]
    found = history.spent().xs("site-0", level="site")["epsilon"].tolist()
    assert found == [epsilon_of(once * n, delta=1e-3) for n in (1, 2)]
    assert found[1] > epsilon_of([Gaussian(noise_multiplier=2.0)] * 2, delta=1e-3)


@pytest.mark.parametrize("other", [local(delta=1e-4), local(accountant="prv")])
def test_what_cannot_be_added_up_is_refused_before_the_run_or_else_nothing_is_sent(other, monkeypatch):
    with pytest.raises(ValueError, match=r"use the same δ, adjacency and accountant$"):
        each_round(trainer(), blob_sites((2, 2)), privacy=local() + other)
    monkeypatch.setattr(LocalGaussian, "terms", None, raising=False)  # as of a technique that does not show its terms
    with pytest.raises(PrivacyError, match=r"use the same δ, adjacency and accountant; nothing was sent"):
        next(each_round(trainer(), blob_sites((2, 2)), privacy=local() + other))


def test_an_adaptive_clip_at_the_server_follows_updates_that_are_private_at_the_site_already():
    """The bits leave although the site's ledger holds back all other numbers: they are about the private update."""
    central = CentralGaussian(clip=AdaptiveClip(start=10.0, bit_noise=4.0), noise_multiplier=0.1, delta=1e-3)
    for technique in (patients() + central, local() + central):
        finished = list(each_round(trainer(steps=2), blob_sites((3, 4)), privacy=technique, rounds=2,
                                   strategy=FedAvg(weights="uniform")))
        norms = [float(one.state.broadcast["clipping norm"]) for one in finished]
        assert len(set(norms)) == 2 and all(0 < norm != 10.0 for norm in norms)
        assert all(numbers.keys() & {"loss"} == set() and numbers["within_clip"] in (-0.5, 0.5)
                   for one in finished for numbers in one.sites.values())
