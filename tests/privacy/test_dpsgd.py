"""Gradients of single patients, Opacus's clipping and noise on them, and what the ledger says of it."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import irregular
from chance import SIGMAS, seeded
from cohorts import Scaled, TinyNet, blob_patient, blob_sites
from fedlab.core.errors import PrivacyBudgetExhausted, PrivacyError, SiteError
from fedlab.core.kit import Kit
from fedlab.core.regions import labels_to_regions
from fedlab.core.types import Site, SiteState, Spent, Update
from fedlab.core.weights import trainable, weights_sha256
from fedlab.privacy.accounting.ledger import PATIENT_ZEROED, Gaussian, Ledger, epsilon_of
from fedlab.privacy.accounting.ledger_file import LedgerFile
from fedlab.privacy.dp import dpsgd
from fedlab.privacy.dp.clipping import AdaptiveClip
from fedlab.privacy.dp.dpsgd import DPSGD, PatientBatches
from fedlab.privacy.dp.gradients import MODES, per_patient
from fedlab.privacy.noise.streams import noise_generator
from fedlab.run.federate import each_round, federate
from fedlab.run.local import Local
from fedlab.strategies import FedAvg
from trainers import plain_sgd, trainer

#: Everybody in every step, whole volumes as crops: nothing is random but the noise.
ALL = dict(sample_rate=1.0, delta=1e-2)


def equipped(technique: DPSGD, site: Site, *, seed: int = 0, state: SiteState | None = None, **changes) -> Kit:
    """A site's kit as `SiteTask` makes it, wrapped by the technique."""
    one = trainer(optimiser=plain_sgd, lr=1.0, **changes)
    state = SiteState(owner="privacy") if state is None else state
    kit = one.prepare(site, FedAvg().begin(one.initial()), site_state=state.of("optimiser"), seed=seed)
    return technique.equip(kit, site, state)


def noisy_gradients(kit: Kit) -> list[list[torch.Tensor]]:
    """What the optimiser is given in each step, per parameter."""
    steps = []
    for image, target in kit.loader:
        kit.optimiser.zero_grad(set_to_none=True)
        kit.backward(kit, image, target)
        kit.optimiser.step()
        steps.append([p.grad.clone() for p in trainable(kit.model).values()])
    kit.close()
    return steps


def own_gradient(model, objective, image, target) -> list[torch.Tensor]:
    """By plain autograd, of one patient's crops."""
    return list(torch.autograd.grad(objective(model(image), target), list(trainable(model).values())))


def batch_of(sites, crops=1):
    patients = [p for site in sites for p in site.train]
    image = torch.stack([torch.stack([p.image.roll(k, 1) for k in range(crops)]) for p in patients])
    target = torch.stack([torch.stack([labels_to_regions(p.label)] * crops) for p in patients])
    return image, target


@pytest.mark.parametrize("gradients", MODES)
@pytest.mark.parametrize("crops", [1, 3])
def test_every_mode_gives_the_gradients_of_batches_of_one(gradients, crops):
    image, target = batch_of(blob_sites((3,)), crops)
    kit = equipped(DPSGD(clip=1.0, noise_multiplier=1.0, gradients=gradients, **ALL), blob_sites((3,))[0])
    found = list(per_patient(kit, image, target, gradients))
    assert len(found) == (3 if gradients == "backward" else 1)
    for k in range(3):
        part, place = (found[k], 0) if gradients == "backward" else (found[0], k)
        for ours, theirs in zip(part.gradients, own_gradient(kit.model, kit.objective, image[k], target[k]),
                                strict=True):
            assert ours.dtype == torch.float32
            torch.testing.assert_close(ours[place], theirs, rtol=1e-4, atol=1e-7)
    assert all(p.grad is None and not hasattr(p, "grad_sample") for p in kit.model.parameters())


@pytest.mark.parametrize("per_layer", [False, True])
def test_every_mode_gives_the_same_clipped_noised_gradient_as_the_algorithm_written_out(per_layer):
    site, clip, sigma = blob_sites((3,))[0], 0.05, 0.7
    results = {}
    for gradients in MODES:
        technique = DPSGD(clip=clip, noise_multiplier=sigma, per_layer=per_layer, gradients=gradients, **ALL)
        results[gradients] = noisy_gradients(equipped(technique, site, steps=1))[0]

    model, image, target = TinyNet(), *batch_of([site])
    objective, noise = trainer().loss, noise_generator(0, "noise")
    single = [own_gradient(model, objective, image[k], target[k]) for k in range(3)]
    whole = [math.sqrt(sum(float(g.square().sum()) for g in one)) for one in single]
    assert min(whole) > 2 * clip  # every gradient is really clipped
    for j, like in enumerate(single[0]):
        total = torch.zeros_like(like)
        for one, norm in zip(single, whole, strict=True):
            own = clip / 2 / (float(one[j].norm()) + 1e-6) if per_layer else clip / (norm + 1e-6)  # 4 tensors: √4
            total += one[j] * min(1.0, own)
        expected = (total + torch.normal(0.0, sigma * clip, like.shape, generator=noise)) / 3
        for found in results.values():
            torch.testing.assert_close(found[j], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("gradients", ["backward", "functorch"])
def test_without_noise_and_clip_it_is_plain_training(gradients):
    sites, full = blob_sites((3, 3)), dict(steps=None, epochs=2, batch_size=3)  # every step sees all three patients
    private = federate(trainer(**full), sites, rounds=3, progress=False,
                       privacy=DPSGD(clip=math.inf, noise_multiplier=0, sample_rate=1.0, gradients=gradients))
    plain = federate(trainer(**full), sites, rounds=3, progress=False)
    for name, p in private.state.params.items():
        torch.testing.assert_close(p, plain.state.params[name], rtol=1e-3, atol=1e-4)
    assert private.table()["loss"].iloc[-1] == pytest.approx(plain.table()["loss"].iloc[-1], rel=1e-3)
    assert "no formal guarantee" in repr(private) and private.spent().empty


def test_the_ledger_over_rounds_equals_the_closed_form_and_opacus():
    from opacus.accountants import PRVAccountant, RDPAccountant

    for accountant, theirs in (("rdp", RDPAccountant()), ("prv", PRVAccountant())):
        technique = DPSGD(clip=1.0, noise_multiplier=1.3, batch=2, delta=1e-2, accountant=accountant)
        history = federate(trainer(steps=4), blob_sites((5,)), privacy=technique, rounds=3, progress=False)
        release = Gaussian(noise_multiplier=1.3, sample_rate=2 / 5, steps=4)
        spent = history.spent().reset_index()
        epsilons = list(spent["epsilon"])
        assert epsilons == [epsilon_of([release] * n, delta=1e-2, accountant=accountant) for n in (1, 2, 3)]
        for n in range(3):
            for _ in range(4):
                theirs.step(noise_multiplier=1.3, sample_rate=2 / 5)
            assert epsilons[n] == pytest.approx(theirs.get_epsilon(1e-2), rel=1e-3)
        assert set(spent["unit"]) == {"patient"} and "loss" not in history.table()


class Numbered:
    """Patients that are their own number."""

    def __len__(self):
        return 7

    def __getitem__(self, k):
        return torch.tensor([float(k)]), torch.tensor([float(k)])


@pytest.mark.chance
def test_patients_are_drawn_independently_with_the_stated_probability():
    steps, rate = 3000, 0.3
    rng = torch.Generator().manual_seed(seeded(1))
    taken = torch.zeros(steps, 7)
    for step, (image, _) in enumerate(PatientBatches(Numbered(), sample_rate=rate, steps=steps, crops=2, rng=rng)):
        if len(image):
            assert image.shape[1:] == (2, 1) and torch.equal(image[:, 0], image[:, 1])
            taken[step, image[:, 0, 0].long()] = 1
    error = (rate * (1 - rate) / steps) ** 0.5
    assert (taken.mean(dim=0) - rate).abs().max() < SIGMAS * error
    correlation = torch.corrcoef(taken.T)[~torch.eye(7, dtype=torch.bool)]
    assert correlation.abs().max() < SIGMAS / steps**0.5
    lagged = torch.corrcoef(torch.stack([taken[:-1].flatten(), taken[1:].flatten()]))[0, 1]
    assert abs(lagged) < SIGMAS / (7 * steps) ** 0.5
    nobody = (1 - rate) ** 7
    assert abs(float((taken.sum(dim=1) == 0).double().mean()) - nobody) < SIGMAS * (nobody / steps) ** 0.5


class Croppings(Numbered):
    """Patients whose every crop is another one."""

    def __init__(self):
        self.taken = 0

    def __getitem__(self, k):
        self.taken += 1
        return torch.tensor([float(self.taken)]), torch.tensor([float(self.taken)])


def test_the_crops_of_a_patient_are_drawn_one_by_one():
    [(image, target)] = PatientBatches(Croppings(), sample_rate=1.0, steps=1, crops=3, rng=None)
    assert image.flatten().tolist() == target.flatten().tolist() == list(range(1, 22))  # 7 patients, 3 crops of each
    [(image, _)] = PatientBatches(Croppings(), sample_rate=1.0, steps=1, rng=None)
    assert image.shape == (7, 1, 1)
    [nobody] = PatientBatches(Croppings(), sample_rate=1e-12, steps=1, rng=None)
    assert [part.shape for part in nobody] == [(0,), (0,)]


@pytest.mark.parametrize("gradients", ["backward", "hooks", "functorch"])
def test_dropout_leaves_out_other_parts_for_each_patient(gradients):
    image, target = batch_of(blob_sites((1,)))
    kit = equipped(DPSGD(clip=1.0, noise_multiplier=1.0, gradients=gradients, **ALL), blob_sites((1,))[0])
    kit.model = torch.nn.Sequential(torch.nn.Dropout(0.5), kit.model).train()
    same = image.repeat(2, 1, 1, 1, 1, 1), target.repeat(2, 1, 1, 1, 1, 1)
    first = torch.cat([found.gradients[0] for found in per_patient(kit, *same, gradients)])
    assert len(first) == 2 and not torch.allclose(first[0], first[1], rtol=1e-3)


@pytest.mark.chance
def test_drawing_from_the_operating_system_has_the_stated_probability():
    sizes = [len(image) for image, _ in PatientBatches(Numbered(), sample_rate=0.3, steps=3000, rng=None)]
    assert abs(sum(sizes) / 21000 - 0.3) < SIGMAS * (0.21 / 21000) ** 0.5


def pure_noise(technique: DPSGD, *, seed: int = 0, steps: int = 300) -> torch.Tensor:
    """(steps, parameters): the noise of steps that draw nobody, over the clipping norm."""
    site = blob_sites((2,))[0]
    kit = equipped(technique, site, seed=seed, steps=steps)
    clip = technique.clip.start if isinstance(technique.clip, AdaptiveClip) else technique.clip
    found = torch.stack([torch.cat([g.flatten() for g in step]) for step in noisy_gradients(kit)])
    return found.double() * technique.sample_rate * len(site.train) / clip


NOBODY = dict(sample_rate=1e-6, delta=1e-2)


@pytest.mark.chance
@pytest.mark.parametrize(("options", "deviation"), [
    ({}, 1.5), ({"per_layer": True}, 1.5), ({"secure_mode": True}, 1.5),
    ({"clip": AdaptiveClip(start=0.2, bit_noise=1.0, quantile=0.5, lr=1e-16)}, (1.5**-2 - 2.0**-2) ** -0.5)])
def test_noise_has_the_moments_of_a_gaussian_and_nothing_repeats(options, deviation):
    technique = DPSGD(**({"clip": 0.2, "noise_multiplier": 1.5} | NOBODY | options))
    assert technique.noise_on_gradients == pytest.approx(deviation)
    noise = pure_noise(technique, seed=seeded(0)) / deviation
    n = noise.numel()
    assert n > 200_000
    assert abs(float(noise.mean())) < SIGMAS / n**0.5
    assert abs(float(noise.square().mean()) - 1) < SIGMAS * (2 / n) ** 0.5
    assert abs(float(noise.pow(4).mean()) - 3) < SIGMAS * (96 / n) ** 0.5
    between_steps = (noise[:-1] * noise[1:]).mean()
    tensors = noise.split([p.numel() for p in TinyNet().parameters()], dim=1)
    between_tensors = (tensors[0][:, :6] * tensors[1]).mean()
    assert abs(float(between_steps)) < SIGMAS / (n - noise.shape[1]) ** 0.5
    assert abs(float(between_tensors)) < SIGMAS / (6 * len(noise)) ** 0.5


@pytest.mark.chance
def test_noise_is_other_noise_in_another_round_and_at_another_site():
    technique = DPSGD(clip=0.2, noise_multiplier=1.5, **NOBODY)
    one, again, other = (pure_noise(technique, seed=seeded(seed), steps=40) for seed in (3, 3, 4))
    assert torch.equal(one, again)
    correlation = (one * other).mean() / 1.5**2
    assert abs(float(correlation)) < SIGMAS / one.numel() ** 0.5
    run = [next(each_round(trainer(optimiser=plain_sgd, steps=1), blob_sites((2, 2)), privacy=technique,
                           strategy=FedAvg(weights="uniform"), seed=seed)).state for seed in (0, 0, 1)]
    assert weights_sha256(run[0].params) == weights_sha256(run[1].params) != weights_sha256(run[2].params)


@settings(max_examples=25, deadline=None)
@given(scale=st.floats(1e-3, 1e4), clip=st.floats(1e-3, 1e3), left_out=st.integers(0, 2), per_layer=st.booleans(),
       gradients=st.sampled_from(MODES), half=st.booleans(), batches=irregular.groups(3))
def test_nobody_moves_the_sum_by_more_than_the_clipping_norm(scale, clip, left_out, per_layer, gradients, half,
                                                             batches):
    image, target = batch_of(blob_sites((3,)))
    image = image[..., :4, :4, :4] * scale
    target = target[..., :4, :4, :4]
    kit = equipped(DPSGD(clip=clip, noise_multiplier=0, sample_rate=1.0, per_layer=per_layer, gradients=gradients),
                   blob_sites((3,))[0], precision="bf16" if half and gradients == "backward" else "fp32")
    sums = []
    for away in (None, left_out):
        kit.optimiser.zero_grad(set_to_none=True)
        # A step in several batches, of which some draw nobody; ExpandedWeights take one batch a step.
        for batch in batches if gradients != "ew" else [[0, 1, 2]]:
            chosen = [k for k in batch if k != away]
            if chosen:
                kit.backward(kit, image[chosen], target[chosen])
            else:
                kit.backward(kit, torch.empty(0), torch.empty(0))  # as PatientBatches gives it
        weights = [p.detach().clone() for p in kit.model.parameters()]
        kit.optimiser.step()
        sums.append([p.grad.double() * 3 for p in kit.model.parameters()])
        for p, before in zip(kit.model.parameters(), weights, strict=True):
            p.data.copy_(before)
    moved = math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(*sums, strict=True)))
    rounding = 1e-6 * max(float(t.norm()) for t in sums[0])
    assert moved <= clip * (1 + 1e-5) + rounding


@pytest.mark.chance
def test_steps_that_draw_nobody_are_taken_accounted_and_move_the_model_by_noise_alone():
    one = trainer(optimiser=plain_sgd, lr=1.0, steps=5)
    technique = DPSGD(clip=0.2, noise_multiplier=1.5, **NOBODY)
    finished = next(each_round(one, blob_sites((2,)), privacy=technique, seed=seeded(0)))
    assert finished.sites["site-0"]["steps"] == 5
    kept = finished.site_states["site-0"]
    assert Ledger(kept).releases() == [Gaussian(noise_multiplier=1.5, sample_rate=1e-6, steps=5)]
    moved = torch.cat([(p - one.initial()[name]).flatten() for name, p in finished.state.params.items()])
    spread = 1.5 * 0.2 * 5**0.5 / 2e-6
    assert float(moved.std()) == pytest.approx(spread, rel=SIGMAS / (2 * len(moved)) ** 0.5)
    assert len(kept.diagnostics["norms of patients' gradients"]) == 0
    quiet = federate(trainer(), blob_sites((2,)), rounds=1, progress=False,
                     privacy=DPSGD(clip=1.0, noise_multiplier=0, sample_rate=1e-9))
    assert "loss" not in quiet.table() or quiet.table()["loss"].isna().all()
    for name, p in quiet.state.params.items():
        torch.testing.assert_close(p, one.initial()[name], atol=1e-5, rtol=1e-5)  # only the weight decay


def test_the_adaptive_clip_follows_the_gradients_and_outlives_rounds():
    tiny = AdaptiveClip(start=1e-4, bit_noise=1e-9, quantile=0.5, lr=0.2)
    technique = DPSGD(clip=tiny, noise_multiplier=0, sample_rate=1.0)
    *_, last = each_round(trainer(), blob_sites((3,)), privacy=technique, rounds=2)
    kept = last.site_states["site-0"]
    # Every gradient is longer: in each of 6 steps the norm grows by exp(0.2 × (0.5 - 0)).
    assert float(kept.namespaces["privacy"]["clipping norm"]) == pytest.approx(1e-4 * math.exp(0.6), rel=1e-6)
    assert float(kept.diagnostics["share beyond the clipping norm"]) == 1.0

    state = SiteState()
    start = AdaptiveClip(start=1.0, bit_noise=1e-9, quantile=0.5, lr=0.1)
    noisy_gradients(equipped(DPSGD(clip=start, noise_multiplier=0, sample_rate=1.0), blob_sites((5,))[0], steps=60,
                             state=state, model=still()))
    reached = float(state.own["clipping norm"])
    norms = state.diagnostics["norms of patients' gradients"][:5].sort().values
    assert norms[1] * 0.9 < reached < norms[3] * 1.1 < 0.9  # it swings about the median by exp(0.1 × 0.5)

    empty = SiteState()
    technique = DPSGD(clip=start, noise_multiplier=0, sample_rate=1e-9)
    noisy_gradients(equipped(technique, blob_sites((5,))[0], steps=3, state=empty, model=TinyNet()))
    assert math.isfinite(float(empty.own["clipping norm"]))  # where Opacus's own divides by zero


def still() -> TinyNet:
    """A network whose gradients don't change as it trains: its steps are undone."""
    net = TinyNet()
    start = [p.detach().clone() for p in net.parameters()]

    def undo(module, inputs):
        with torch.no_grad():
            for p, before in zip(module.parameters(), start, strict=True):
                p.copy_(before)

    net.register_forward_pre_hook(undo)
    return net


@pytest.mark.chance
def test_bits_are_noised_at_the_stated_scale():
    rule = AdaptiveClip(start=1.0, bit_noise=4.0, quantile=0.5, lr=0.1)
    logs = []
    for seed in range(60):
        state = SiteState()
        technique = DPSGD(clip=rule, noise_multiplier=1.0, sample_rate=0.5, delta=1e-2)
        kit = equipped(technique, blob_sites((4,))[0], seed=seeded(seed), steps=1, state=state)
        next(iter(kit.loader))
        kit.optimiser.zero_grad(set_to_none=True)
        kit.backward(kit, torch.empty(0), torch.empty(0))
        kit.optimiser.step()
        kit.close()
        logs.append(math.log(float(state.own["clipping norm"])) / -0.1 * 2)  # share - 1/2, times expected 2
    noise = torch.tensor(logs)
    assert abs(float(noise.mean())) < SIGMAS * 4 / 60**0.5
    assert float(noise.square().mean()) / 16 == pytest.approx(1, abs=SIGMAS * (2 / 60) ** 0.5)


def test_moments_are_kept_and_the_network_is_left_as_it_was_found():
    one = trainer()
    technique = DPSGD(clip=0.5, noise_multiplier=1.0, gradients="hooks", **ALL)
    before = weights_sha256(federate(one, blob_sites((3,)), rounds=1, progress=False).state.params)
    *_, last = each_round(one, blob_sites((3, 2)), privacy=technique, rounds=2)
    moments = last.site_states["site-1"].namespaces["optimiser"]
    assert {key.split("|")[1] for key in moments} == {"step", "exp_avg", "exp_avg_sq"}
    assert float(moments["first.weight|step"]) == 6
    for p in one.model.parameters():
        assert not {"grad_sample", "summed_grad", "_forward_counter"} & set(vars(p)) and p.grad is None
    assert all(not m._forward_hooks and not m._backward_hooks for m in one.model.modules())
    assert weights_sha256(federate(one, blob_sites((3,)), rounds=1, progress=False).state.params) == before


def test_six_rounds_with_crashes_equal_six_without(tmp_path):
    technique = DPSGD(clip=AdaptiveClip(start=0.1, bit_noise=2.0), noise_multiplier=1.0, batch=2, delta=1e-2)
    whole = federate(trainer(), blob_sites(), privacy=technique, rounds=6, progress=False)

    def crash(finished):
        if finished.number in (0, 3):
            raise KeyboardInterrupt

    for _ in range(3):
        try:
            history = federate(trainer(), blob_sites(), privacy=technique, rounds=6, progress=False,
                               checkpoint=tmp_path / "run", on_round=crash)
        except KeyboardInterrupt:
            continue
    assert weights_sha256(history.state.params) == weights_sha256(whole.state.params)
    assert history.spent().equals(whole.spent())


@pytest.mark.chance
def test_noise_from_the_operating_system_never_repeats_and_is_charged_each_time(tmp_path):
    technique = DPSGD(clip=0.5, noise_multiplier=1.0, secure_mode=True, **ALL)
    engine, one = Local(ledgers=tmp_path), trainer()
    runs = [next(each_round(one, blob_sites((3,)), privacy=technique, engine=engine)) for _ in range(2)]
    assert weights_sha256(runs[0].state.params) != weights_sha256(runs[1].state.params)
    assert len(LedgerFile(tmp_path, "site-0").read().releases()) == 2
    kits = [equipped(technique, blob_sites((3,))[0], steps=2) for _ in range(2)]
    a, b = (torch.cat([g.flatten() for g in noisy_gradients(kit)[0]]) for kit in kits)
    assert abs(float((a - b).std()) / (2**0.5 * 0.5 / 3) - 1) < SIGMAS / (2 * len(a)) ** 0.5


def test_it_learns_within_a_budget_and_withdraws_when_it_is_used_up():
    sites = [Site(name=f"site-{k}", train=[blob_patient(f"s{k}p{i}", seed=50 * k + i) for i in range(16)])
             for k in range(2)]
    held = blob_sites((1,))[0].val
    image, target = batch_of([Site(name="held", train=held)])

    def validate(model, number):
        with torch.no_grad():
            return {"held-out loss": float(trainer().loss(model(image[0]), target[0]))}

    technique = DPSGD(clip=0.3, noise_multiplier=2.0, batch=8, delta=1e-2, max_epsilon=6.0)
    history = federate(trainer(steps=4, lr=5e-2), sites, privacy=technique, rounds=30, progress=False,
                       validate=validate)
    loss, spent = history.table()["held-out loss"], history.spent()["epsilon"]
    assert "no site is left" in history.stopped and 5 < len(history.records) < 30
    assert 5.0 < spent.max() <= 6.0
    assert loss.iloc[-1] < 0.8 * loss.iloc[0]


@pytest.mark.parametrize(("change", "says"), [
    ({"clip": 0.0}, "clip is a positive number"), ({"clip": math.inf}, "finite if there is noise"),
    ({"clip": math.nan}, "clip is a positive"), ({"noise_multiplier": -1.0}, "noise_multiplier"),
    ({"noise_multiplier": math.nan}, "noise_multiplier"), ({"noise_multiplier": math.inf}, "noise_multiplier"),
    ({"noise_multiplier": math.inf, "sample_rate": None, "batch": 1}, "or 0 for no noise and no guarantee, got inf"),
    ({"batch": 2}, "either batch"), ({"sample_rate": None}, "either batch"), ({"sample_rate": 0.0}, "sample_rate"),
    ({"sample_rate": 1.5}, "sample_rate"), ({"sample_rate": None, "batch": -1}, "batch is a positive"),
    ({"delta": 0.0}, "delta lies between"), ({"delta": 1.0}, "delta lies between"), ({"crops": 0}, "crops"),
    ({"crops": 1.5}, "crops"), ({"gradients": "ghost"}, "gradients is one of"), ({"max_epsilon": 0.0}, "max_epsilon"),
    ({"max_epsilon": 0.01}, "more than the budget"), ({"accountant": "moments"}, "accountant is"),
    ({"accountant": "gdp", "sample_rate": 0.5}, "exact only without sampling"),
    ({"clip": AdaptiveClip(start=1.0, bit_noise=0.4)}, "bit_noise must exceed half"),
    ({"clip": AdaptiveClip(start=1.0, bit_noise=2.0), "per_layer": True}, "say per_layer=False")])
def test_bad_settings_are_refused_at_construction(change, says):
    with pytest.raises(ValueError, match=says):
        DPSGD(**({"clip": 1.0, "noise_multiplier": 1.0, **ALL} | change))


def dice_of_the_batch(logits, target):
    from monai.losses import DiceLoss
    return DiceLoss(sigmoid=True, batch=True)(logits, target)


def summed(logits, target):
    return torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="sum")


@pytest.mark.parametrize(("options", "changes", "sizes", "says"), [
    ({"delta": 0.4}, {}, (3,), r"delta is below 1 over the number of patients \(1/3 at site-0\)"),
    ({"sample_rate": None, "batch": 4}, {}, (5, 3), "site-1 has only 3"),
    ({}, {"loss": dice_of_the_batch}, (3,), "mixes patients"), ({}, {"loss": summed}, (3,), "mixes patients"),
    ({"gradients": "ew"}, {"precision": "bf16"}, (3,), "needs float32"),
    ({"gradients": "hooks"}, {"precision": "bf16"}, (3,), "needs float32"),
    ({"max_epsilon": 1.0, "sample_rate": None, "batch": 1}, {"steps": 200}, (3,), "200 steps alone cost")])
def test_what_cannot_work_is_refused_before_the_first_round_and_at_the_site(options, changes, sizes, says):
    technique = DPSGD(**({"clip": 1.0, "noise_multiplier": 1.0, **ALL} | options))
    with pytest.raises(ValueError, match=says):
        each_round(trainer(**changes), blob_sites(sizes), privacy=technique)
    if "steps alone" not in says:
        with pytest.raises(ValueError, match=says):
            equipped(technique, blob_sites(sizes)[-1], **changes)


def test_a_patient_twice_a_second_dpsgd_and_a_broken_scan_are_refused():
    technique = DPSGD(clip=1.0, noise_multiplier=1.0, **ALL)
    one = blob_patient("same", seed=1)
    with pytest.raises(ValueError, match="several scans of 1 of its persons"):
        each_round(trainer(), [Site(name="a", train=[one, one])], privacy=technique)
    with pytest.raises(ValueError, match="more than once"):  # no ids of persons are asked without a guarantee
        each_round(trainer(), [Site(name="a", train=[one, one])],
                   privacy=DPSGD(clip=1.0, noise_multiplier=0, **ALL))
    with pytest.raises(ValueError, match="stands once"):
        technique + technique
    broken = blob_patient("broken", seed=2)
    broken.image[0, 0, 0, 0] = float("nan")
    with pytest.raises((SiteError, PrivacyError), match="loss of a patient is nan"):
        next(each_round(trainer(), [Site(name="a", train=[one, broken])], privacy=technique))


def test_it_prints_as_the_code_that_makes_it():
    technique = DPSGD(clip=AdaptiveClip(start=0.1, bit_noise=2.0), noise_multiplier=1.0, batch=2, crops=4)
    assert repr(eval(repr(technique))) == repr(technique)
    assert repr(DPSGD(clip=0.5, noise_multiplier=0.75, batch=3)) == (
        "DPSGD(clip=0.5, noise_multiplier=0.75, delta=1e-05, batch=3, sample_rate=None, crops=1, per_layer=False, "
        "gradients='backward', accountant='rdp', max_epsilon=None, secure_mode=False)")
    assert technique.units == {"patient"} and DPSGD(clip=1.0, noise_multiplier=0, batch=1).units == frozenset()


# What a round costs, and where its chance comes from

def exact_epsilon(noise: float, steps: int, delta: float) -> float:
    """Of Gaussian steps in which every patient takes part (Balle and Wang 2018, theorem 8), by bisection."""
    mu, low, high = math.sqrt(steps) / noise, 0.0, 500.0
    for _ in range(100):
        middle = (low + high) / 2
        spent = stats.norm.cdf(mu / 2 - middle / mu) - math.exp(middle + stats.norm.logcdf(-middle / mu - mu / 2))
        low, high = (middle, high) if spent > delta else (low, middle)
    return high


@pytest.mark.parametrize(("training", "steps"), [
    ({"steps": 5}, 5), ({"steps": None, "epochs": 3, "batch_size": 2}, 8),  # ⌈3 · 5 / 2⌉
    ({"steps": None, "epochs": 1, "batch_size": 3}, 2), ({"steps": None, "epochs": 2, "batch_size": 5}, 2)])
def test_before_the_run_a_round_costs_what_its_steps_cost(training, steps):
    shared = dict(clip=1.0, noise_multiplier=4.0, sample_rate=1.0, delta=1e-2, accountant="gdp")
    exact, sites = exact_epsilon(4.0, steps, 1e-2), blob_sites((5,))
    with pytest.raises(ValueError, match=f"a round of {steps} steps alone costs ε = "):
        each_round(trainer(**training), sites, privacy=DPSGD(max_epsilon=exact * 0.999, **shared))
    each_round(trainer(**training), sites, privacy=DPSGD(max_epsilon=exact * 1.001, **shared))


def test_before_the_run_a_batch_is_charged_at_the_site_s_own_rate():
    """2 of 5 patients a step: less than 2 of 3, by Opacus's accountant."""
    from opacus.accountants import RDPAccountant

    theirs = {}
    for size in (3, 5):
        accountant = RDPAccountant()
        accountant.history = [(2.0, 2 / size, 4)]
        theirs[size] = accountant.get_epsilon(delta=1e-2)
    technique = DPSGD(clip=1.0, noise_multiplier=2.0, batch=2, delta=1e-2, max_epsilon=1.02 * theirs[5])
    assert theirs[3] > 1.2 * theirs[5]
    each_round(trainer(steps=4), blob_sites((5,)), privacy=technique)
    with pytest.raises(ValueError, match="a round of 4 steps alone costs"):
        each_round(trainer(steps=4), blob_sites((3,)), privacy=technique)
    tight = DPSGD(clip=1.0, noise_multiplier=2.0, batch=2, delta=1e-2, max_epsilon=0.97 * theirs[5])
    with pytest.raises(ValueError, match="a round of 4 steps alone costs"):
        each_round(trainer(steps=4), blob_sites((5,)), privacy=tight)


def test_one_step_alone_is_held_against_the_budget_when_the_rate_is_known():
    exact = exact_epsilon(1.5, 1, 1e-2)
    shared = dict(clip=1.0, noise_multiplier=1.5, delta=1e-2, sample_rate=1.0, accountant="gdp")
    with pytest.raises(ValueError, match=r"^one step alone costs ε = "):
        DPSGD(max_epsilon=exact * 0.999, **shared)
    DPSGD(max_epsilon=exact * 1.001, **shared)
    DPSGD(clip=1.0, noise_multiplier=1.5, delta=1e-2, batch=1, max_epsilon=1e-9)  # no rate is known yet


@pytest.mark.parametrize(("sent", "steps"), [(0, 1), (1, 1), (7, 7)])
def test_a_site_states_at_least_what_its_steps_spend(sent, steps):
    """Also where it says that it took none; a rate that follows from its number of patients is not known."""
    update = Update(site="a", delta={"w": torch.zeros(2)}, weight=3.0, steps=sent)
    technique = DPSGD(clip=1.0, noise_multiplier=3.0, accountant="gdp", **ALL)
    least = technique.least_spent(update)
    assert least.epsilon == pytest.approx(exact_epsilon(3.0, steps, 1e-2), rel=1e-6)
    assert least._replace(epsilon=0.0) == Spent(0.0, 1e-2, "patient", "gdp", PATIENT_ZEROED)
    unknown = DPSGD(clip=1.0, noise_multiplier=3.0, batch=1, delta=1e-2)
    assert unknown.least_spent(update) == Spent(0.0, 1e-2, "patient", "rdp", PATIENT_ZEROED)
    assert DPSGD(clip=1.0, noise_multiplier=0, sample_rate=1.0).least_spent(update) is None


def test_patients_and_bits_are_drawn_from_streams_of_their_own():
    """Doubles of the site's stream: of floats, a rate below 2**-24 would be that. Six steps of 2 of 5 patients."""
    rule, state, site = AdaptiveClip(start=1.0, bit_noise=4.0, quantile=0.25, lr=0.1), SiteState(), blob_sites((5,))[0]
    kit = equipped(DPSGD(clip=rule, noise_multiplier=1.0, batch=2, delta=1e-2), site, seed=11, steps=6, state=state)
    rng, drawn, expected = noise_generator(11, "patients"), [], []
    for image, _ in kit.loader:
        drawn.append([k for one in image for k, p in enumerate(site.train) if torch.equal(one[0], p.image)])
        values = torch.rand(5, generator=rng, dtype=torch.float64).tolist()
        expected.append([k for k, value in enumerate(values) if value < 2 / 5])
        kit.optimiser.zero_grad(set_to_none=True)
        kit.backward(kit, torch.empty(0), torch.empty(0))
        kit.optimiser.step()
    kit.close()
    assert drawn == expected and len({tuple(one) for one in drawn}) > 2
    rng = noise_generator(11, "bits")
    noise = [float(torch.randn((), generator=rng, dtype=torch.float64)) for _ in range(6)]
    log = -0.1 * sum(0.5 + 4.0 * z / 2 - 0.25 for z in noise)
    assert float(state.own["clipping norm"]) == pytest.approx(math.exp(log), rel=1e-9)


@pytest.mark.parametrize("secure", [False, True])
def test_patients_are_drawn_anew_in_secure_mode_only(secure):
    technique = DPSGD(clip=1.0, noise_multiplier=1.0, sample_rate=0.5, delta=1e-2, secure_mode=secure)
    drawn = [[image.flatten().tolist()[:: 16**3] for image, _ in equipped(
        technique, blob_sites((5,))[0], seed=3, steps=40, augment=None).loader] for _ in range(2)]
    assert (drawn[0] == drawn[1]) is not secure


def test_diagnostics_are_those_of_the_steps_by_hand():
    """Three steps of the same four gradients, of which two are longer than the clip."""
    site, model, objective, state = blob_sites((4,))[0], TinyNet(), trainer().loss, SiteState()
    image, target = batch_of([site])
    image[1] *= 9
    single = [torch.cat([g.flatten() for g in own_gradient(model, objective, image[k], target[k])]).double()
              for k in range(4)]
    lengths = sorted(float(g.norm()) for g in single)
    clip = (lengths[1] + lengths[2]) / 2
    kit = equipped(DPSGD(clip=clip, noise_multiplier=0.7, **ALL), site, steps=3, state=state, model=still())
    for _ in range(3):
        kit.optimiser.zero_grad(set_to_none=True)
        assert kit.backward(kit, image, target) == pytest.approx(
            sum(objective(model(image[k]), target[k]).item() for k in range(4)) / 4, rel=1e-5)
        kit.optimiser.step()
    kit.close()
    found = state.diagnostics
    total = sum(g * min(1.0, clip / (float(g.norm()) + 1e-6)) for g in single)
    assert float(found["norm of the clipped sum"]) == pytest.approx(float(total.norm()), rel=1e-5)
    assert float(found["norm of the noise"]) == pytest.approx(0.7 * clip * math.sqrt(len(total)), rel=1e-6)
    assert float(found["share beyond the clipping norm"]) == 0.5
    assert found["norms of patients' gradients"].tolist() == pytest.approx(
        3 * [float(g.norm()) for g in single], rel=1e-5)
    assert {name: (t.dtype, t.shape) for name, t in found.items()} == {
        "norm of the clipped sum": (torch.float64, ()), "norm of the noise": (torch.float64, ()),
        "norms of patients' gradients": (torch.float64, (12,)),
        "share beyond the clipping norm": (torch.float64, ())}


def test_without_noise_there_is_no_norm_of_noise_and_no_share_of_nobody():
    state = SiteState()
    noisy_gradients(equipped(DPSGD(clip=1.0, noise_multiplier=0, sample_rate=1e-9), blob_sites((3,))[0], steps=2,
                             state=state))
    assert state.diagnostics.keys() == {"norms of patients' gradients", "share beyond the clipping norm"}
    assert float(state.diagnostics["share beyond the clipping norm"]) == 0.0


def test_a_gradient_just_as_long_as_the_clip_is_within_it():
    state, site = SiteState(), blob_sites((1,))[0]
    noisy_gradients(equipped(DPSGD(clip=1.0, noise_multiplier=0, sample_rate=1.0), site, steps=1, state=state))
    [length] = state.diagnostics["norms of patients' gradients"].tolist()
    rule, kept = AdaptiveClip(start=length, bit_noise=1e-12, quantile=0.3, lr=0.5), SiteState()
    noisy_gradients(equipped(DPSGD(clip=rule, noise_multiplier=0, sample_rate=1.0), site, steps=1, state=kept))
    assert float(kept.own["clipping norm"]) == pytest.approx(length * math.exp(-0.5 * 0.7), rel=1e-9)
    assert kept.own["clipping norm"].dtype == torch.float64
    assert float(kept.diagnostics["share beyond the clipping norm"]) == 0.0
    noisy_gradients(equipped(DPSGD(clip=length / 2, noise_multiplier=0, sample_rate=1.0), site, steps=1, state=kept))
    assert float(kept.diagnostics["share beyond the clipping norm"]) == 1.0  # of one patient


def test_the_site_s_hardware_is_asked_once_as_the_trainer_says(monkeypatch):
    asked = []
    monkeypatch.setattr(dpsgd, "pick_device", lambda wish: asked.append(wish) or torch.device("cpu"))
    monkeypatch.setattr(dpsgd, "pick_precision", lambda wish, device: asked.append((wish, device)) or torch.float32)
    DPSGD(clip=1.0, noise_multiplier=1.0, **ALL).check(SimpleNamespace(trainer=trainer(device="cpu")))
    assert asked == ["cpu", ("fp32", torch.device("cpu"))]


def test_a_parameter_that_is_a_single_number_is_not_clipped_per_layer():
    technique = DPSGD(clip=1.0, noise_multiplier=1.0, per_layer=True, **ALL)
    with pytest.raises(ValueError, match=r"parameters of shape \(\): say per_layer=False"):
        each_round(trainer(model=Scaled()), blob_sites((3,)), privacy=technique)
    each_round(trainer(), blob_sites((3,)), privacy=technique)


def test_all_patients_and_several_crops_make_a_batch():
    technique = DPSGD(clip=1.0, noise_multiplier=1.0, delta=1e-2, batch=3, crops=2)
    each_round(trainer(), blob_sites((3, 4)), privacy=technique)
    [(image, target)] = equipped(technique, blob_sites((3,))[0], steps=1).loader
    assert image.shape == (3, 2, 4, 16, 16, 16) and target.shape == (3, 2, 3, 16, 16, 16)


def test_half_precision_is_for_patients_that_are_taken_one_by_one():
    technique = DPSGD(clip=1.0, noise_multiplier=1.0, **ALL)
    each_round(trainer(precision="bf16"), blob_sites((3,)), privacy=technique)
    assert equipped(technique, blob_sites((3,))[0], precision="bf16").dtype is torch.bfloat16


def test_a_site_s_rounds_together_stay_within_its_budget():
    """Six steps in two rounds fit, nine do not; what a round would cost is entered before its first step."""
    exact, state = exact_epsilon(4.0, 6, 1e-2), SiteState()
    technique = DPSGD(clip=1.0, noise_multiplier=4.0, accountant="gdp", max_epsilon=exact * 1.001, **ALL)
    for rounds in (1, 2):
        equipped(technique, blob_sites((2,))[0], steps=3, state=state)
        [spent] = Ledger(state).spent()
        assert spent.epsilon == pytest.approx(exact_epsilon(4.0, 3 * rounds, 1e-2), rel=1e-6) and spent.repeats
    with pytest.raises(PrivacyBudgetExhausted, match="this release would make it"):
        equipped(technique, blob_sites((2,))[0], steps=3, state=state)
    assert len(Ledger(state).releases()) == 2
