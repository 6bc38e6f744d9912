"""The attack finds the patch in an unprotected update, and not under noise; the sliders state the true settings."""

from __future__ import annotations

import math
import threading

import numpy as np
import pytest
import torch

from cohorts import blob_patient
from fedlab.core.regions import labels_to_regions
from fedlab.core.types import MODALITIES, Patient, rounded_up
from fedlab.evidence.inversion import Inversion, invert_update, one_step_update, patch_net
from fedlab.evidence.reconstruction import channel_correlations, tissue_prior
from fedlab.privacy.accounting.ledger import Gaussian, epsilon_of
from fedlab.privacy.dp.site_level import LocalGaussian
from fedlab.training.defaults import DiceBCE
from fedlab.view.playground import Knobs, PrivacyPlayground
from runs import wait_for


def smooth_patient(*, size: int = 12, seed: int = 0) -> Patient:
    """A scan with structure: smooth waves, different in each channel, and a brighter tumour."""
    rng = torch.Generator().manual_seed(seed)
    axes = torch.meshgrid(*[torch.linspace(0, 1, size)] * 3, indexing="ij")
    image = torch.stack([sum(torch.sin(float(2 * math.pi * torch.rand((), generator=rng))
                                       + float(4 * torch.rand((), generator=rng) + 3) * axis) for axis in axes)
                         for _ in range(4)])
    label = blob_patient("label", seed=0).label[2:2 + size, 2:2 + size, 2:2 + size].contiguous()
    image = image + 0.8 * (label > 0)
    return Patient("smooth", (image - image.mean()) / image.std(), label, np.diag([3.0, 3.0, 3.0, 1.0]))


@pytest.fixture(scope="module")
def patient() -> Patient:
    return smooth_patient()


@pytest.fixture
def playground(patient):
    made = PrivacyPlayground(patient=patient, model=patch_net(width=8), public=(), crop=12, steps=80, rounds=10,
                             auto=False)
    yield made
    wait_for(lambda: not attacks(), seconds=20, why="an attack still runs")


def attacks() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "fedlab attack"]


def test_the_update_is_the_step_that_plain_training_takes(patient):
    model, regions = patch_net(width=8), labels_to_regions(patient.label)
    update = one_step_update(model, patient.image, regions, lr=0.05)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    DiceBCE()(model(patient.image[None]), regions[None]).backward()
    optimiser.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(update.delta[name], parameter.detach() - before[name], rtol=1e-4, atol=1e-7)


def test_without_noise_the_patch_is_found_and_under_strong_noise_it_is_not(playground):
    """One seed, since an attack takes seconds; the bounds leave room on both sides."""
    norm = playground.update.norm()
    bare = playground.set(clip=10 * norm, noise_multiplier=0).reconstruct()
    clipped = playground.set(clip=norm / 100, noise_multiplier=0).reconstruct()
    noisy = playground.set(clip=norm, noise_multiplier=1.0).reconstruct()
    truth = playground.patch
    assert bare.correlation(truth) > 0.4 and bare.distance < 0.1
    assert clipped.correlation(truth) == pytest.approx(bare.correlation(truth), abs=0.02)  # only the norm changes
    assert abs(noisy.correlation(truth)) < 0.15 and noisy.distance > 0.5
    assert bare.steps == clipped.steps == noisy.steps == 80
    assert f"{noisy.correlation(truth):.2f}" in playground.html()


def test_an_attack_repeats_and_ends_when_it_is_told_to(patient):
    model, regions = patch_net(width=8), labels_to_regions(patient.label)
    update = one_step_update(model, patient.image, regions)
    state = torch.get_rng_state()
    one, other = (invert_update(update.delta, model=model, regions=regions, steps=5) for _ in range(2))
    assert torch.equal(one.image, other.image) and one.image.shape == (4, 12, 12, 12)
    assert torch.equal(torch.get_rng_state(), state) and all(p.grad is None for p in model.parameters())
    seen = []
    ended = invert_update(update.delta, model=model, regions=regions, steps=50,
                          on_step=lambda taken, patch: seen.append(patch.shape) or taken < 3)
    assert ended.steps == 3 and seen == [(4, 12, 12, 12)] * 3
    assert invert_update(update.delta, model=model, regions=regions, steps=10**6, max_seconds=0.2).steps < 10**6


def test_attacks_refuse_what_they_cannot_use(patient):
    model, regions = patch_net(width=8), labels_to_regions(patient.label)
    update = one_step_update(model, patient.image, regions)
    with pytest.raises(ValueError, match="does not fit the model"):
        invert_update(update.delta, model=patch_net(width=4), regions=regions)
    with pytest.raises(ValueError, match="zero everywhere"):
        invert_update(update.map(torch.zeros_like).delta, model=model, regions=regions)
    with pytest.raises(ValueError, match="steps is a positive number"):
        invert_update(update.delta, model=model, regions=regions, steps=0)
    with pytest.raises(ValueError, match="expected an image"):
        one_step_update(model, patient.image, regions[:, 1:])
    found = invert_update(update.delta, model=model, regions=regions, steps=1)
    with pytest.raises(ValueError, match="give the patch"):
        found.correlation(patient.image[:, 1:])
    with pytest.raises(ValueError, match="same value everywhere"):
        found.correlation(torch.zeros(4, 12, 12, 12))


def test_what_is_sent_is_what_the_techniques_of_a_run_send(playground):
    norm = playground.update.norm()
    knobs = Knobs(clip=norm / 2, noise_multiplier=0.5, fraction=0.25)
    assert repr(knobs.privacy(delta=0.01)) == (
        repr(LocalGaussian(clip=norm / 2, noise_multiplier=0.5, delta=0.01, accountant="gdp"))
        + " + PartialSharing(fraction=0.25, exclude=[], clip=None)")
    sent = knobs.protect(playground.update, delta=0.01, seed=0)
    flat = torch.cat([t.flatten() for t in sent.delta.values()])
    assert int((flat != 0).sum()) == math.ceil(0.25 * flat.numel())
    clipped = Knobs(clip=norm / 2).protect(playground.update, delta=0.01, seed=0)
    assert clipped.norm() == pytest.approx(norm / 2, rel=1e-5) and clipped.spent == ()
    noise = torch.cat([(a - b).flatten() for a, b in zip(
        Knobs(clip=norm / 2, noise_multiplier=0.5).protect(playground.update, delta=0.01, seed=0).delta.values(),
        clipped.delta.values(), strict=True)])
    # About 2800 draws: for all but one seed in ten thousand their deviation is within 5 % of σ.
    assert float(noise.std()) == pytest.approx(0.5 * norm / 2, rel=0.06)


def test_the_accountant_is_the_ledgers(playground):
    spent = Knobs(clip=1.0, noise_multiplier=4.0).spent(delta=0.01, rounds=1)
    assert Knobs(clip=playground.update.norm(), noise_multiplier=4.0).protect(
        playground.update, delta=0.01, seed=0).spent == (spent,)
    ten = Knobs(clip=1.0, noise_multiplier=4.0).spent(delta=0.01, rounds=10)
    assert ten.epsilon == epsilon_of([Gaussian(noise_multiplier=2.0, steps=10)], delta=0.01, accountant="gdp")
    assert Knobs(clip=1.0).spent(delta=0.01, rounds=10) is None
    playground.set(noise_multiplier=4.0)
    assert f"{ten}, after 10 rounds" in playground.html()
    playground.set(noise_multiplier=0)
    assert "no formal guarantee: there is no ε" in playground.html() and "ε =" not in playground.html()


def test_epsilon_and_sigma_follow_each_other(playground):
    playground.set(epsilon=5.0)
    spent = playground.knobs.spent(delta=0.01, rounds=10)
    assert 4.95 < spent.epsilon <= 5.0
    assert playground._epsilon.value == float(rounded_up(spent.epsilon)) >= spent.epsilon
    playground._epsilon.value = 50.0  # as from the browser
    assert 49 < playground.knobs.spent(delta=0.01, rounds=10).epsilon <= 50
    playground._sigma.value = 1.0
    spent = playground.knobs.spent(delta=0.01, rounds=10)
    assert playground._epsilon.value == float(rounded_up(spent.epsilon)) >= spent.epsilon
    far = Knobs(clip=1e6 * playground.update.norm(), noise_multiplier=1e4, fraction=0.001)
    playground.set(clip=far.clip, noise_multiplier=far.noise_multiplier, fraction=far.fraction)
    assert playground.knobs == far  # beyond the initial range of the sliders
    with pytest.raises(ValueError, match="give one of them"):
        playground.set(epsilon=1.0, noise_multiplier=1.0)


def test_moving_a_knob_changes_what_is_shown_and_starts_an_attack_anew(patient):
    made = PrivacyPlayground(patient=patient, model=patch_net(width=8), public=(), crop=12, steps=25, auto=True)
    assert len(attacks()) == 1
    first = made._facts_box.value
    made._clip.value = made.update.norm() / 3
    assert made._facts_box.value != first and f"clipped to {made._clip.value:.3g}" in made._facts_box.value
    wait_for(lambda: not attacks(), seconds=30, why="the attack does not end")
    assert list(made._found) == [made.knobs]  # the cancelled attack left no result
    assert "correlation with the true patch" in made._picture_box.value
    assert made._picture_box.value.count("data:image/png") == 12  # the patch, its reconstruction, their difference
    made._fraction.value = 0.5
    assert "no attack on these settings yet" in made._picture_box.value
    assert made._picture_box.value.count("data:image/png") == 4  # never the picture of other settings
    assert made.reconstruct() is made._found[made.knobs] and not attacks()


def test_both_rows_have_one_grey_window_and_their_difference_a_row(playground):
    truth = playground.patch
    playground._found[playground.knobs] = Inversion(image=truth + 1000.0, distance=0.0, steps=1, seconds=0.1)
    shown = playground._pictures()
    assert list(shown) == ["the patch", "reconstruction", "difference"]
    assert all(float(row.max()) == 1.0 and float(row.min()) == 0.0 for row in shown["the patch"])
    assert all((row == 1.0).all() for row in shown["reconstruction"] + shown["difference"])
    playground._found[playground.knobs] = Inversion(image=truth.clone(), distance=0.0, steps=1, seconds=0.1)
    assert all((row == 0.5).all() for row in playground._pictures()["difference"])
    assert "within them FLAIR 1.00, T1 1.00, T1c 1.00, T2 1.00" in playground._outcome()


@pytest.fixture
def tiny_public(monkeypatch):
    """A network of another size in place of the public model, which takes a minute."""
    asked = []

    def loaded(name):
        asked.append(name)
        return patch_net(width=4, seed=9)

    monkeypatch.setattr("fedlab.view.playground.public_model", loaded)
    return asked


def test_the_weights_can_be_those_of_the_public_model(patient, tiny_public):
    made = PrivacyPlayground(patient=patient, public=[smooth_patient(seed=5)], crop=12, steps=20, auto=False)
    assert made.weights == "random" and not tiny_public and made._weights.value == "random"
    small, ratio = made.update, made.knobs.clip / made.update.norm()
    first = made.reconstruct()
    made.set(weights="public")
    assert tiny_public == ["collection"] and made._weights.value == made.weights == "public"
    assert made.update.norm() != pytest.approx(small.norm())
    assert made.knobs.clip / made.update.norm() == pytest.approx(ratio, rel=0.01)
    assert made._clip.min < math.log10(made.knobs.clip) < made._clip.max
    assert "no attack on these settings yet" in made.html()  # never that of other weights
    assert made.reconstruct().image.shape == first.image.shape
    made._weights.value = "random"  # as from the browser
    assert made.reconstruct() is first and torch.equal(made.update.delta["0.weight"], small.delta["0.weight"])
    with pytest.raises(ValueError, match="weights is one of 'random', 'public'"):
        made.set(weights="trained")
    with pytest.raises(ValueError, match="weights is one of 'random', 'public'"):
        PrivacyPlayground(patient=patient, weights="trained")


def test_scores_stand_beside_what_was_expected_without_an_update(patient, tiny_public):
    """The attack on the public model begins at the expectation: one step of it is hardly another picture."""
    others = [smooth_patient(seed=5), smooth_patient(seed=6)]
    made = PrivacyPlayground(patient=patient, public=[patient, *others], weights="public", crop=12, steps=1, auto=False)
    patches = [(p.image.float(), labels_to_regions(p.label)) for p in others]  # without the patient attacked
    expected = tissue_prior(patches, labels_to_regions(patient.label))
    torch.testing.assert_close(made.prior, expected)
    found = made.reconstruct()
    assert float((found.image - expected).abs().mean()) < 0.3 < float((found.image - made.patch).abs().mean())
    scores = ", ".join(f"{name} {value:.2f}" for name, value in zip(
        MODALITIES, channel_correlations(expected, made.patch).tolist(), strict=True))
    assert f"expected without any update {scores}" in made.html() and "proves nothing" in made.html()
    assert "From trained weights of a large network this attack is weak" in made.html()
    without = PrivacyPlayground(patient=patient, public=[patient], model=patch_net(width=4), crop=12, steps=1,
                                auto=False)
    without.reconstruct()
    assert without.prior is None and "expected without" not in without.html()


def test_it_says_whether_a_person_recognises_the_patch(playground):
    def outcome(image: torch.Tensor) -> str:
        playground._found[playground.knobs] = Inversion(image=image, distance=0.0, steps=1, seconds=0.1)
        return playground._outcome()

    truth = playground.patch
    assert "A person recognises the patch" in outcome(truth.clone())
    half = truth.clone()
    half[2] = torch.randn(half[2].shape, generator=torch.Generator().manual_seed(0))  # T1c is not found
    assert "A part of the patch is seen" in outcome(half) and "recognises" not in outcome(half)
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1))
    assert "No more than was known before is seen" in outcome(noise)


def test_sliders_without_effect_are_disabled_and_numbers_are_short(playground):
    assert playground._sigma.disabled and playground._epsilon.disabled
    playground._noise.value = True  # as from the browser
    assert not playground._sigma.disabled and not playground._epsilon.disabled
    assert playground.knobs.noise_multiplier == playground._sigma.value > 0
    playground._noise.value = False
    assert playground._sigma.disabled and playground.knobs.noise_multiplier == 0
    norm = playground.update.norm()
    assert norm <= playground.knobs.clip < 1.01 * norm and len(repr(playground.knobs.clip)) < 12
    playground._clip.value = norm / 3
    assert playground.knobs.clip == float(f"{norm / 3:.3g}")


def test_progress_is_seen_while_an_attack_runs_and_columns_stand_side_by_side(patient):
    made = PrivacyPlayground(patient=patient, model=patch_net(width=8), public=(), crop=12, steps=60, auto=True)
    seen = []
    made._bar.observe(lambda change: seen.append((change.new, made._bar.layout.visibility)), names="value")
    wait_for(lambda: not attacks(), seconds=60, why="the attack does not end")
    assert seen[-1] == (60, "visible") and len(seen) >= 3 and made._bar.layout.visibility == "hidden"
    left, right = made.widget.children
    assert made._clip in left.children and made._picture_box in right.children
    assert made.widget.layout.flex_flow == "row wrap"  # one column where there is no room for two


def test_colours_follow_the_theme(playground):
    playground.reconstruct()
    page = playground.html()
    assert "background:#fff" not in page and "color:#555" not in page.replace("font-color2,#555", "")
    assert page.count("<table") == page.count('<table style="color:inherit') == 2  # also in a page without a doctype
    assert "var(--jp-layout-color1,#fff)" in page and "var(--jp-ui-font-color1,#222)" in page


def test_a_static_picture_is_left_where_there_is_no_kernel(playground):
    playground.reconstruct()
    bundle = playground._repr_mimebundle_()
    assert {"text/plain", "text/html", "image/png", "application/vnd.jupyter.widget-view+json"} <= bundle.keys()
    assert "http" not in bundle["text/html"] and "correlation" in bundle["text/plain"]


@pytest.mark.parametrize("wrong, message", [
    (dict(rounds=0), "rounds is .* got 0"), (dict(delta=1.0), "delta is .* got 1.0"),
    (dict(crop=40), "at least 40 voxels"),
    (dict(patient=Patient("x", torch.zeros(4, 16, 16, 16), None, np.eye(4))), "no label"),
    (dict(patient=Patient("x", torch.zeros(4, 16, 16, 16), torch.zeros(16, 16, 16, dtype=torch.uint8), np.eye(4))),
     "0 tumour voxels"),
])
def test_bad_settings_are_refused(patient, wrong, message):
    with pytest.raises(ValueError, match=message):
        PrivacyPlayground(**({"patient": patient, "crop": 12, "auto": False} | wrong))


@pytest.mark.parametrize("wrong", [dict(clip=0.0), dict(clip=1.0, noise_multiplier=-1.0),
                                   dict(clip=1.0, fraction=0.0), dict(clip=float("nan"))])
def test_knobs_refuse_wrong_settings(wrong):
    with pytest.raises(ValueError):
        Knobs(**wrong)
