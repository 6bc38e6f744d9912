"""check_privacy() accepts the techniques of fedlab and names what is wrong with broken ones."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from cohorts import BatchNet, TinyNet, blob_patient, blob_sites
from fedlab.checks.check_report import CheckReport, Finding
from fedlab.checks.privacy import check_privacy
from fedlab.checks.small_runs import plain_descent
from fedlab.core.errors import PrivacyError
from fedlab.core.seeds import generator
from fedlab.core.types import Site
from fedlab.privacy.accounting.ledger import Gaussian, Ledger, Pure, Terms
from fedlab.privacy.at_sites import AtSites
from fedlab.privacy.base import Privacy
from fedlab.privacy.compression import Quantise, ScaledSign, TopK
from fedlab.privacy.dp.clipping import AdaptiveClip, clip_update
from fedlab.privacy.dp.dpsgd import DPSGD
from fedlab.privacy.dp.site_level import CentralGaussian, LocalGaussian
from fedlab.privacy.personal_layers import PersonalLayers
from fedlab.privacy.secure_aggregation.secure_sum import SecureAggregation
from fedlab.privacy.sparse.partial_sharing import SVT, PartialSharing, SparseVector
from fedlab.strategies import FedAvg
from trainers import trainer

ONE = Terms(unit="site", delta=1e-3, adjacency="any two updates of a site")


def small(technique: Privacy, *, patients: int = 4, sites: int = 2, **more) -> CheckReport:
    """The report on a network so small that all checks take a second or two."""
    cohort = [Site(f"site-{k}", [blob_patient(f"s{k}p{i}", seed=10 * k + i, shape=(12, 12, 12))
                                 for i in range(patients)]) for k in range(sites)]
    one = trainer(model=TinyNet(), lr=1.0, steps=1, crop=(12, 12, 12), optimiser=plain_descent)
    return check_privacy(technique, trainer=one, sites=cohort, **{"raise_": False, **more})


def local(**changes) -> LocalGaussian:
    return LocalGaussian(**({"clip": 1.0, "noise_multiplier": 4.0, "delta": 1e-3} | changes))


def central(**changes) -> CentralGaussian:
    return CentralGaussian(**({"clip": 1.0, "noise_multiplier": 1.0, "delta": 1e-3} | changes))


GOOD = [
    Privacy(), TopK(keep=0.1, error_feedback=True), ScaledSign(), Quantise(), PartialSharing(fraction=0.2),
    PersonalLayers(names=["last.*"]), local(), local(per_layer=True, accountant="gdp"), local(secure_mode=True),
    central(), central(clip=AdaptiveClip(start=1.0, bit_noise=2.0)),
    SparseVector(fraction=0.1, epsilon=4.0, delta=1e-3),
    SVT(fraction=0.3, epsilon_threshold=1.0, epsilon_release=1.0, delta=1e-3),
    DPSGD(clip=0.5, noise_multiplier=1.0, delta=1e-3, batch=2), TopK(keep=0.1, error_feedback=True) + local(),
    PersonalLayers(names=["last.bias"]) + central(),
]


@pytest.mark.parametrize("technique", GOOD, ids=repr)
def test_techniques_of_fedlab_pass(technique):
    report = small(technique, raise_=True)
    assert report and not report.failed and report.warned == ()
    names = {finding.check for finding in report.findings}
    assert {"fits the run", "shapes and names", "purity", "state", "determinism", "fails closed", "ledger"} <= names
    if technique.units or isinstance(technique, CentralGaussian):
        assert {"noise", "sensitivity"} <= names


def test_what_warns_is_no_failure():
    report = small(local() + TopK(keep=0.1, error_feedback=True))
    assert report and report.warned == ("order",) and "TopK before LocalGaussian" in str(report)
    assert small(local() + local()).warned == ("order",)


def test_secure_aggregation_with_noise_passes():
    technique = SecureAggregation(clip=1.0, threshold=2, noise_multiplier=1.0, delta=1e-3)
    report = small(technique, sites=3)
    assert report and not report.warned, str(report)
    assert {"noise", "sensitivity", "budget"} <= {finding.check for finding in report.findings}


# Each of these has one defect; the check that must name it comes first.


class Gauss(Privacy):
    """Right: clip, charge, noise. What is wrong with the others is seen beside it."""

    units = frozenset({"site"})

    def __init__(self, *, clip=1.0, noise_multiplier=4.0, max_epsilon=None):
        self.clip, self.noise_multiplier, self.max_epsilon = clip, noise_multiplier, max_epsilon

    def charge(self, state):
        Ledger(state).charge(Gaussian(noise_multiplier=self.noise_multiplier / 2), terms=ONE,
                              max_epsilon=self.max_epsilon)

    def noisy(self, update, rng):
        std = self.noise_multiplier * self.clip
        return update.map(lambda t: t + std * torch.randn(t.shape, generator=rng))

    def protect(self, update, state, rng):
        self.charge(state)
        return self.noisy(clip_update(update, self.clip), rng)


def test_the_right_one_passes():
    assert small(Gauss()) and small(Gauss(clip=0.01, noise_multiplier=1.0))


class Nothing(Privacy):
    def protect(self, update, state, rng):
        return None


class DropsATensor(Privacy):
    def protect(self, update, state, rng):
        return replace(update, delta=dict(list(update.delta.items())[1:]))


class Flattens(Privacy):
    def protect(self, update, state, rng):
        return update.map(lambda t: t.flatten())


class WholeNumbers(Privacy):
    def protect(self, update, state, rng):
        return update.map(lambda t: t.round().long())


class InPlace(Privacy):
    def protect(self, update, state, rng):
        return update.map(lambda t: t.mul_(0.5))


class ChangesScans(Privacy):
    def equip(self, kit, site, state):
        site.train[0].image.add_(1.0)
        return kit


class Counts(Privacy):
    def __init__(self):
        self.rounds = 0

    def protect(self, update, state, rng):
        self.rounds += 1
        return update


class Meddles(Privacy):
    def protect(self, update, state, rng):
        for slots in state.namespaces.values():
            for name in slots:
                slots[name] = torch.zeros(1)
        return update


class Forgets(Privacy):
    def protect(self, update, state, rng):
        for owner in list(state.namespaces):
            del state.namespaces[owner]
        return update


class KeepsNumbers(Privacy):
    def protect(self, update, state, rng):
        state.own["clip"] = 3.0
        return update


class BadName(Privacy):
    def protect(self, update, state, rng):
        state.own[3] = torch.tensor(3.0)
        return update


class GlobalNoise(Gauss):
    def noisy(self, update, rng):
        return super().noisy(update, None)


class NumpyNoise(Gauss):
    def noisy(self, update, rng):
        std = self.noise_multiplier * self.clip
        return update.map(lambda t: t + std * torch.from_numpy(np.random.standard_normal(tuple(t.shape))).float())


class HidesDamage(Privacy):
    def protect(self, update, state, rng):
        return update.map(torch.nan_to_num)


class SkipsDamage(Privacy):
    def protect(self, update, state, rng):
        return update.map(lambda t: t.where(t.abs() <= 0.5, 0.0))


class Unpaid(Gauss):
    def charge(self, state):
        pass


class PaidOnce(Gauss):
    def charge(self, state):
        if "paid" not in state.own:
            super().charge(state)
        state.own["paid"] = torch.ones(())


class NoBudget(Gauss):
    def charge(self, state):
        Ledger(state).charge(Gaussian(noise_multiplier=self.noise_multiplier / 2), terms=ONE)


class PaysLate(Gauss):
    """Sends first: the budget is looked at in a place of no consequence."""

    def protect(self, update, state, rng):
        out = self.noisy(clip_update(update, self.clip), rng)
        Ledger(state).charge(Gaussian(noise_multiplier=self.noise_multiplier / 2), terms=ONE)
        return out


class ClipOnly(Privacy):
    def protect(self, update, state, rng):
        return clip_update(update, 1.0)


class SilentServer(ClipOnly):
    def release(self, mean, cohort, state, rng):
        Ledger(state).charge(Gaussian(noise_multiplier=1.0), terms=ONE)
        return mean.map(lambda t: t + torch.randn(t.shape, generator=rng, dtype=t.dtype))


class Masked(Gauss):
    """Right: shares entries that everyone knows, the same in all rounds, and only these get noise."""

    def mask(self, update):
        rng = torch.Generator().manual_seed(5)
        return {name: (torch.rand(t.shape, generator=rng) < 0.4).float() for name, t in update.delta.items()}

    def protect(self, update, state, rng):
        self.charge(state)
        mask = self.mask(update)
        shared = replace(update, delta={name: t * mask[name] for name, t in update.delta.items()})
        noisy = self.noisy(clip_update(shared, self.clip), rng)
        return replace(noisy, delta={name: t * mask[name] for name, t in noisy.delta.items()})


def test_entries_under_a_mask_that_everyone_knows_need_no_noise():
    assert small(Masked()) and small(Masked(clip=0.01, noise_multiplier=1.0))


class MaskedTooLittle(Masked):
    def noisy(self, update, rng):
        return replace(update, delta={name: (t + out) / 2 for (name, t), out in zip(
            update.delta.items(), super().noisy(update, rng).delta.values(), strict=True)})


class BesideTheMask(Masked):
    """Updates of an ordinary length leave a mark where others are 0."""

    def protect(self, update, state, rng):
        mark = float(0.05 < update.norm() < 0.5) * 1e-3
        return super().protect(update, state, rng).map(lambda t: torch.where(t == 0, mark, t))


class NoNoise(Gauss):
    def noisy(self, update, rng):
        return update


class HeadOnly(Gauss):
    """One tensor without noise."""

    def noisy(self, update, rng):
        return replace(update, delta={**super().noisy(update, rng).delta, "first.bias": update.delta["first.bias"]})


class OnlyWhereNotZero(Gauss):
    def noisy(self, update, rng):
        out = super().noisy(update, rng)
        return replace(out, delta={n: t.where(update.delta[n] != 0, 0.0) for n, t in out.delta.items()})


class SameNoise(Gauss):
    """The same noise in every run."""

    def noisy(self, update, rng):
        return super().noisy(update, generator(0, "noise"))


class TooLittle(Gauss):
    """Sensitivity of any two updates is twice the clip, not the clip."""

    def charge(self, state):
        Ledger(state).charge(Gaussian(noise_multiplier=self.noise_multiplier), terms=ONE, max_epsilon=self.max_epsilon)


class NoClip(Gauss):
    def protect(self, update, state, rng):
        self.charge(state)
        return self.noisy(update, rng)


class ClipsEachTensor(Gauss):
    """To the whole bound each: together they are √L times as long."""

    def protect(self, update, state, rng):
        self.charge(state)
        return self.noisy(update.map(lambda t: t * min(1.0, self.clip / max(float(t.norm()), 1e-30))), rng)


class ClipsEntries(Gauss):
    def protect(self, update, state, rng):
        self.charge(state)
        return self.noisy(update.map(lambda t: t.clamp(-self.clip, self.clip)), rng)


class ClipsAfter(Gauss):
    def protect(self, update, state, rng):
        self.charge(state)
        return clip_update(self.noisy(update, rng), self.clip)


class LowersOnly(Gauss):
    """Scales everything to the clip, so that tiny updates are blown up: bounded, and right."""

    def protect(self, update, state, rng):
        self.charge(state)
        scale = self.clip / max(update.norm(), 1e-30)
        return self.noisy(update.map(lambda t: t * scale), rng)


class Remembers(Gauss):
    """Error feedback on the wrong side of the noise: what was cut off is added to the next noisy update."""

    def protect(self, update, state, rng):
        self.charge(state)
        clipped = clip_update(update, self.clip)
        out = self.noisy(clipped, rng)
        waiting = dict(state.own)
        state.own.update({n: t - clipped.delta[n] for n, t in update.delta.items()})
        return replace(out, delta={n: t + waiting.get(n, 0.0) for n, t in out.delta.items()})


class Tells(Privacy):
    """Alone it is harmless; behind noise it sends what an earlier layer wrote down of the raw update."""

    def protect(self, update, state, rng):
        raw = next(slots for slots in state.namespaces.values() if slots.keys() == update.delta.keys())
        return replace(update, delta={n: t + raw[n] for n, t in update.delta.items()})


class WritesDown(Privacy):
    def protect(self, update, state, rng):
        state.own.update({n: t.clone() for n, t in update.delta.items()})
        return update


class LaplaceTooSmall(Privacy):
    """ε-private noise for one entry, charged once but added to each of many."""

    units = frozenset({"site"})

    def __init__(self, *, max_epsilon=None):
        self.max_epsilon = max_epsilon

    def protect(self, update, state, rng):
        Ledger(state).charge(Pure(epsilon=1.0), terms=ONE, max_epsilon=self.max_epsilon)
        def noise(t):
            return 2.0 * (torch.empty(t.shape).exponential_(generator=rng) - torch.empty(t.shape).exponential_(
                generator=rng))
        return update.map(lambda t: t.clamp(-1, 1) + noise(t))


class Stretches(Privacy):
    """Between a clip and its noise: rounding up to whole steps lengthens the update."""

    def protect(self, update, state, rng):
        return update.map(lambda t: torch.sign(t) * t.abs().clamp(min=0.2))


class NoiseOnly(Gauss):
    def protect(self, update, state, rng):
        self.charge(state)
        return self.noisy(update, rng)


class CentralUnclipped(CentralGaussian):
    def protect(self, update, state, rng):
        return replace(update, weight=1.0, metrics={})


ADAPTIVE = dict(clip=AdaptiveClip(start=1.0, bit_noise=2.0), noise_multiplier=1.0, delta=1e-3)


class LessNoiseThanCharged(CentralGaussian):
    """Noise for half the sensitivity."""

    def release(self, mean, cohort, state, rng):
        half = CentralGaussian(clip=self.clip / 2, noise_multiplier=self.noise_multiplier, delta=self.delta)
        return half.release(mean, cohort, state, rng)


class OwnClip(CentralGaussian):
    """Clips at the site to something longer than the norm that the server's noise is for."""

    def protect(self, update, state, rng):
        return replace(super().protect(update, state, rng), delta=clip_update(update, 3.0).delta)


class BareBits(CentralGaussian):
    """The clipping norm that the sites are sent follows the updates without any noise."""

    def release(self, mean, cohort, state, rng):
        out = super().release(mean, cohort, state, rng)
        share = 0.5 + mean.metrics["within_clip"] * len(cohort) / cohort.sites
        state.broadcast["clipping norm"] = torch.tensor(self.clip.moved(1.0, share), dtype=torch.float64)
        return out


class Unclipped(DPSGD):
    """Patients' gradients as they are, under the name of DP-SGD."""

    def equip(self, kit, site, state):
        kit = super().equip(kit, site, state)
        kit.optimiser.max_grad_norm = 1e9
        kit.optimiser.noise_multiplier = self.noise_multiplier * self.clip / 1e9
        return kit


class CropsAsPatients(DPSGD):
    """Three times the gradient of each patient enters the sum."""

    def equip(self, kit, site, state):
        kit = super().equip(kit, site, state)
        whole, kit.loader = kit.loader, None

        class Thrice:
            def __len__(self):
                return len(whole)

            def __iter__(self):
                for image, target in whole:
                    yield (image, target) if not len(image) else (image.repeat(3, 1, 1, 1, 1, 1),
                                                                  target.repeat(3, 1, 1, 1, 1, 1))

        kit.loader = Thrice()
        return kit


class NoiselessSteps(DPSGD):
    def equip(self, kit, site, state):
        kit = super().equip(kit, site, state)
        kit.optimiser.noise_multiplier = 0.0
        return kit


class HiddenSetting(Privacy):
    def __init__(self, *, keep=0.5):
        self._k = keep


def dpsgd(kind):
    return kind(clip=0.05, noise_multiplier=1.0, delta=1e-3, sample_rate=0.6)


BROKEN = [
    ("shapes and names", Nothing()), ("shapes and names", DropsATensor()), ("shapes and names", Flattens()),
    ("shapes and names", WholeNumbers()),
    ("purity", InPlace()), (("purity", "determinism"), ChangesScans()), ("purity", Counts()),
    ("state", Meddles()), ("state", Forgets()), ("state", KeepsNumbers()), ("state", BadName()),
    ("determinism", GlobalNoise()), ("determinism", NumpyNoise()),
    ("fails closed", HidesDamage()), ("fails closed", SkipsDamage()),
    ("ledger", Unpaid()), ("ledger", PaidOnce()), ("ledger", SilentServer()),
    ("budget", NoBudget()), ("budget", PaysLate()),
    ("noise", NoNoise()), ("noise", HeadOnly()), ("noise", OnlyWhereNotZero()), ("noise", SameNoise()),
    ("sensitivity", TooLittle()), ("sensitivity", NoClip()), ("sensitivity", ClipsEachTensor()),
    (("fails closed", "sensitivity"), ClipsEntries()), ("sensitivity", ClipsAfter()),
    ("sensitivity", MaskedTooLittle()), ("beside the update", BesideTheMask()),
    ("sensitivity", Remembers()), ("sensitivity", WritesDown() + Gauss() + Tells()),
    (("fails closed", "sensitivity"), LaplaceTooSmall()), ("sensitivity", ClipOnly() + Stretches() + NoiseOnly()),
    ("sensitivity", LessNoiseThanCharged(clip=1.0, noise_multiplier=1.0, delta=1e-3)),
    ("sensitivity", OwnClip(**ADAPTIVE)), ("sensitivity", CentralUnclipped(clip=1.0, noise_multiplier=1.0, delta=1e-3)),
    ("noise", BareBits(**ADAPTIVE)),
    ("sensitivity", dpsgd(Unclipped)), ("sensitivity", dpsgd(CropsAsPatients)), ("sensitivity", dpsgd(NoiselessSteps)),
]


@pytest.mark.parametrize("check,technique", BROKEN, ids=[repr(technique) for _, technique in BROKEN])
def test_a_broken_technique_is_named(check, technique):
    report = small(technique)
    assert report.failed == ((check,) if isinstance(check, str) else check), str(report)


def test_settings_that_cannot_be_read_are_warned_of():
    assert small(HiddenSetting()).warned == ("settings",) and small(Privacy()).warned == ()


def test_bounded_in_another_way_passes():
    assert small(LowersOnly())


def test_a_failure_raises_with_the_report():
    with pytest.raises(PrivacyError, match=r"failed  purity: InPlace.*\n.*t \* 2, not t.mul_"):
        small(InPlace(), raise_=True)


def test_what_does_not_fit_the_run_says_so():
    assert small(central(), strategy=FedAvg()).failed == ("fits the run",)
    assert small(DPSGD(clip=1.0, noise_multiplier=1.0, batch=9, delta=1e-3)).failed == ("fits the run",)


def test_statistics_of_batch_norm_travel_beside_the_weights():
    class Drops(TopK):
        def protect(self, update, state, rng):
            return replace(super().protect(update, state, rng), buffers={})

    setting = dict(trainer=trainer(model=BatchNet(), crop=(8, 8, 8), steps=2), sites=blob_sites((3, 2)))
    assert check_privacy(TopK(keep=0.1), **setting)
    with pytest.raises(PrivacyError, match=r"failed +shapes and names: Drops.protect[\s\S]*other buffers"):
        check_privacy(Drops(keep=0.1), **setting)


def test_only_a_technique_is_checked():
    with pytest.raises(ValueError, match="make one: put brackets"):
        check_privacy(Gauss)
    with pytest.raises(ValueError, match="derived from"):
        check_privacy("noise")


def test_the_report_prints_and_escapes():
    report = CheckReport("<b>x</b>", [Finding(check="<i>", outcome="failed", what="<script>", remedy="a & b"),
                                      Finding(check="fine", outcome="passed", what="yes")])
    assert not report and report.failed == ("<i>",) and "1 passed, 0 warned, 1 failed" in repr(report)
    html = report._repr_html_()
    assert "<script>" not in html and "<b>" not in html and "a &amp; b" in html and html.count("<tr>") == 2
    assert str(report).splitlines()[1:] == ["failed  <i>: <script>", "        → a & b", "passed  fine: yes"]


def test_everything_is_left_as_it_was():
    torch.manual_seed(3)
    state, numbers = torch.get_rng_state(), np.random.get_state()[1].copy()
    technique = local()
    settings = dict(vars(technique))
    small(technique)
    assert torch.equal(torch.get_rng_state(), state) and np.array_equal(np.random.get_state()[1], numbers)
    assert vars(technique) == settings


def test_the_default_stage_is_a_small_segresnet():
    report = check_privacy(TopK(keep=0.1))
    assert report and report.subject == repr(TopK(keep=0.1))
    assert math.isfinite(len(report.findings))


def test_a_technique_for_some_sites_is_checked_as_it_works_at_them():
    report = check_privacy(AtSites(sites=("a", "b"), technique=local()), raise_=False)
    assert report and report.subject.startswith("AtSites") and "sensitivity" in {f.check for f in report.findings}
    assert check_privacy(AtSites(sites=("a",), technique=TooLittle()), raise_=False).failed == ("sensitivity",)
    mixed = AtSites(sites=("site-0",), technique=local()) + AtSites(sites=("site-1",), technique=NoNoise())
    assert small(mixed).failed == ("noise",)
    with pytest.raises(ValueError, match="not among the given"):
        small(AtSites(sites=("a",), technique=local()))


def test_an_unpaid_promise_is_told_in_the_technique_s_own_name():
    with pytest.raises(PrivacyError, match=r"Unpaid\(.*\) promises a guarantee per site but entered") as raised:
        small(Unpaid(), raise_=True)
    assert "Watched" not in str(raised.value) and "with Aggregation" not in str(raised.value)


def test_weights_that_were_loaded_after_the_trainer_was_made_stay_and_are_named():
    model = TinyNet()
    of_user = trainer(model=model)
    with torch.no_grad():
        model.first.weight.add_(1.0)
    loaded = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = check_privacy(TopK(keep=0.1), trainer=of_user, raise_=False)
    assert "the model was changed after the trainer was made" in str(report)
    assert all(torch.equal(p, loaded[name]) for name, p in model.named_parameters())
