"""Updates tell their site and its patients where nothing is protected, and not under strong noise."""

from __future__ import annotations

import pytest
import torch

from fedlab.core.types import Patient, Site, SiteState, Update
from fedlab.evidence.inference import PropertyInference, SiteInference
from fedlab.privacy.accounting.ledger import Ledger
from fedlab.privacy.dp.site_level import LocalGaussian
from fedlab.run.federate import each_round
from trainers import plain_sgd, trainer

NOISE = LocalGaussian(clip=1.0, noise_multiplier=3.0)


def patient(name: str, seed: int, *, share: float, gain: float = 1.0) -> Patient:
    """Noise with a block of tumour, a share of which enhances."""
    rng = torch.Generator().manual_seed(seed)
    label = torch.zeros(8, 8, 8, dtype=torch.uint8)
    label[1:7, 1:7, 1:7] = 2
    label[2:6, 2:6, 2:6] = torch.where(torch.rand(4, 4, 4, generator=rng) < share, 4, 2).to(torch.uint8)
    return Patient(name, gain * (torch.randn(4, 8, 8, 8, generator=rng) + label), label, torch.eye(4).double().numpy())


def local(site: Site, *, number: int) -> dict[str, torch.Tensor]:
    """The update of a site on its own, of a round of its own."""
    own = trainer(steps=4, lr=1e-2, crop=(8, 8, 8), optimiser=plain_sgd)
    start = own.initial()
    *_, last = each_round(own, [site], rounds=1, seed=number)
    return {name: t - start[name] for name, t in last.state.params.items()}


def protected(delta: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    state = SiteState()
    Ledger.open(state, site="site", round=0, stream=str(seed))
    update = Update(site="site", delta=delta, weight=1.0)
    scaled = update.map(lambda t: t / update.norm())
    return dict(NOISE.protect(scaled, state, torch.Generator().manual_seed(seed)).delta)


def site(name: str, first: int, **kind: float) -> Site:
    return Site(name, [patient(f"{name}-{first + k}", first + k, **kind) for k in range(3)])


@pytest.fixture(scope="module")
def of_scanners():
    """Updates of three sites whose scanners differ: four earlier ones and six later ones each."""
    gains = {"a": 0.5, "b": 1.0, "c": 2.0}
    made = {name: [local(site(name, 100 * k, share=0.5, gain=gain), number=k) for k in range(10)]
            for name, gain in gains.items()}
    return ({name: found[:4] for name, found in made.items()},
            [(name, one) for name, found in made.items() for one in found[4:]])


@pytest.fixture(scope="module")
def of_shares():
    """Updates of patients with much and with little enhancing tumour: the attacker's and the sites'."""
    return {f"{who}_{what}": [local(site(who, base + 100 * k, share=share), number=k) for k in range(count)]
            for who, base, count in (("own", 0, 4), ("sites", 5000, 10))
            for what, share in (("with", 0.9), ("without", 0.1))}


def test_the_site_of_an_update_is_found(of_scanners):
    known, later = of_scanners
    found = SiteInference()(known, later)
    assert found.value > 0.8 and found.low > found.chance == pytest.approx(1 / 3)
    assert found.trials == 18 and found.measure.endswith("one of 3 sites")


def test_a_property_of_patients_is_found(of_shares):
    found = PropertyInference()(**of_shares)
    assert found.value > 0.9 and found.low > 0.5 and found.measure == "AUC" and found.trials == 20


def test_under_strong_noise_neither_is_found(of_scanners, of_shares):
    known, later = of_scanners
    noisy = [(name, protected(one, k)) for k, (name, one) in enumerate(later)]
    assert not SiteInference()(known, noisy).is_clear
    groups = {name: [protected(one, 100 + k) for k, one in enumerate(group)] if name.startswith("sites") else group
              for name, group in of_shares.items()}
    assert not PropertyInference()(**groups).is_clear


def test_clipping_hides_neither(of_scanners):
    known, later = of_scanners
    short = [(name, {key: t / 1000 for key, t in one.items()}) for name, one in later]
    assert SiteInference()(known, short) == SiteInference()(known, later)


def test_bad_groups_are_refused(of_scanners):
    known, later = of_scanners
    for sites, updates in ((dict([next(iter(known.items()))]), later), (known, []), (known, [("d", later[0][1])])):
        with pytest.raises(ValueError, match="two or more sites"):
            SiteInference()(sites, updates)
    with pytest.raises(ValueError, match="with and without"):
        PropertyInference()(own_with=[], own_without=[], sites_with=[], sites_without=[])
