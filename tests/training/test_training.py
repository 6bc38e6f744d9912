"""One site is plain training; a round does what its parts say; bad settings and bad data are refused."""

from __future__ import annotations

import pickle

import pytest
import torch

from cohorts import TinyNet, blob_patient, blob_sites
from fedlab.core.errors import SiteError
from fedlab.core.hardware import pick_precision
from fedlab.core.types import Patient, ServerState, Site, SiteState
from fedlab.core.weights import trainable, weights_sha256
from fedlab.run.baselines import centralised, local_only
from fedlab.run.federate import federate
from fedlab.strategies import FedAvg
from fedlab.training.defaults import DiceBCE, augmentation
from fedlab.training.networks import segresnet
from fedlab.training.schedules import CosineDecay, PolyDecay
from fedlab.training.trainer import Crops
from trainers import batches, plain_sgd, trainer


def test_one_site_is_plain_training():
    site = blob_sites((1,))[0]
    ours = federate(trainer(batch_size=1), [site], rounds=4, progress=False)

    model, loss = TinyNet(), DiceBCE()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=1e-5)
    for image, target in batches(site.train, [[0]] * 12):
        optimiser.zero_grad()
        loss(model(image), target).backward()
        optimiser.step()
    for name, parameter in trainable(model).items():
        torch.testing.assert_close(ours.state.params[name], parameter.detach(), rtol=1e-4, atol=1e-5)


def test_one_full_batch_step_is_one_centralised_gradient_step():
    sites = blob_sites((3, 2, 1))
    everyone = [p for site in sites for p in site.train]
    start = TinyNet()
    total = {name: torch.zeros_like(p) for name, p in start.named_parameters()}
    for site in sites:  # epochs=1 and a batch as large as the site: one full-batch step
        one = trainer(model=TinyNet(), steps=None, epochs=1, batch_size=len(site.train), lr=0.1, optimiser=plain_sgd)
        history = federate(one, [site], rounds=1, progress=False)
        for name in total:
            moved = history.state.params[name] - dict(start.named_parameters())[name].detach()
            total[name] += moved * len(site.train)
    federated = federate(trainer(model=TinyNet(), steps=None, epochs=1, batch_size=8, lr=0.1, optimiser=plain_sgd),
                         sites, rounds=1, progress=False)

    image, target = next(batches(everyone, [range(len(everyone))]))
    model, loss = TinyNet(), DiceBCE()
    loss(model(image), target).backward()
    for name, parameter in model.named_parameters():
        expected = parameter.detach() - 0.1 * parameter.grad
        torch.testing.assert_close(federated.state.params[name], expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(dict(start.named_parameters())[name] + total[name] / len(everyone), expected,
                                   rtol=1e-4, atol=1e-6)


def test_centralised_takes_as_many_steps_as_all_sites():
    sites = blob_sites((3, 2))
    together = federate(trainer(), sites, rounds=2, progress=False)
    central = centralised(trainer(), sites, rounds=2, progress=False)
    alone = local_only(trainer(), sites, rounds=2, progress=False)
    assert central.sites()["steps"].sum() == together.sites()["steps"].sum() == 12
    assert [h.sites()["steps"].sum() for h in alone.values()] == [6, 6]


def test_one_seed_gives_equal_bits_and_another_does_not():
    sites = blob_sites()
    one = trainer(augment=augmentation())
    runs = [federate(one, sites, rounds=2, seed=seed, progress=False) for seed in (5, 5, 6)]
    hashes = [weights_sha256(run.state.params) for run in runs]
    assert hashes[0] == hashes[1] != hashes[2]


def test_federated_training_learns_the_held_out_patient():
    sites = blob_sites()
    history = federate(trainer(steps=10, lr=2e-2), sites, rounds=6, progress=False)
    loss = history.table()["loss"]
    assert loss.iloc[-1] < 0.6 * loss.iloc[0]


def test_kept_moments_go_on_where_restarted_ones_begin_anew():
    sites = blob_sites((1,))
    kept = federate(trainer(batch_size=1, steps=1), sites, rounds=3, progress=False)
    whole = federate(trainer(batch_size=1, steps=3), sites, rounds=1, progress=False)
    again = federate(trainer(batch_size=1, steps=1, momentum="restart"), sites, rounds=3, progress=False)
    for name in whole.state.params:
        torch.testing.assert_close(kept.state.params[name], whole.state.params[name], rtol=1e-4, atol=1e-5)
    assert any((kept.state.params[n] - again.state.params[n]).abs().max() > 1e-4 for n in kept.state.params)


def test_crops_hold_tumour_as_often_as_asked():
    patient = blob_patient("p", seed=1, shape=(40, 40, 40))
    always = Crops([patient], crop=(8, 8, 8), tumour_share=1.0, augment=None, seed=0)
    never = Crops([patient], crop=(8, 8, 8), tumour_share=0.0, augment=None, seed=0)
    assert all(always[0][1][1].any() for _ in range(20))
    assert sum(bool(never[0][1][1].any()) for _ in range(40)) < 20
    image, regions = always[0]
    assert image.shape == (4, 8, 8, 8) and image.dtype == torch.float32
    assert regions.shape == (3, 8, 8, 8) and set(regions.unique().tolist()) <= {0.0, 1.0}


def test_dice_never_mixes_patients():
    loss = DiceBCE()
    logits = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    target = (torch.rand(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(1)) > 0.5).float()
    apart = [loss(logits[i:i + 1], target[i:i + 1]) for i in range(2)]
    torch.testing.assert_close(loss(logits, target), torch.stack(apart).mean())


def test_poly_decay():
    decay = PolyDecay(start=0.5, rounds=10, power=1.0)
    assert [decay(r) for r in (0, 5, 10, 11)] == [0.5, 0.25, 0.0, 0.0]


def test_cosine_decay_with_warm_up():
    decay = CosineDecay(start=0.4, rounds=6, warmup=2)
    # up: 1/3, 2/3; down over the other 4 rounds: cosines of 0, 45, 90 and 135 degrees
    expected = [0.4 / 3, 0.8 / 3, 0.4, 0.2 * (1 + 2**-0.5), 0.2, 0.2 * (1 - 2**-0.5), 0.0]
    assert [decay(r) for r in range(7)] == pytest.approx(expected)
    assert CosineDecay(start=0.4, rounds=2)(0) == 0.4
    with pytest.raises(ValueError, match="warmup is shorter than the 3 rounds of the run, got 3"):
        CosineDecay(start=0.4, rounds=3, warmup=3)


def test_a_large_gradient_is_scaled_down_to_the_clipping_norm():
    def change(**settings):
        used = trainer(optimiser=plain_sgd, lr=0.5, steps=1, **settings)
        after = federate(used, blob_sites((1,)), rounds=1, progress=False).state.params
        return torch.cat([(after[name] - before).double().flatten() for name, before in used.initial().items()])

    free = change()
    norm = float(free.norm()) / 0.5
    clipped = change(clip_norm=norm / 4)
    torch.testing.assert_close(clipped, free / 4, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(change(clip_norm=norm * 1.01), free, rtol=0, atol=0)


@pytest.mark.parametrize("changes, message", [
    (dict(clip_norm=0.0), "clip_norm is a positive number or None"),
    (dict(steps=3, epochs=1), "either steps or epochs"),
    (dict(steps=None), "either steps or epochs"),
    (dict(steps=0), "positive whole number"),
    (dict(batch_size=1.5), "positive whole number"),
    (dict(tumour_share=2), "tumour_share is at least 0 and at most 1"),
    (dict(momentum="both"), "one of 'keep', 'restart'"),
    (dict(precision="fp8"), "one of 'auto', 'bf16', 'fp32'"),
    (dict(lr=-1.0), "positive number"),
])
def test_wrong_settings_are_refused_at_construction(changes, message):
    with pytest.raises(ValueError, match=message):
        trainer(**changes)


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(ValueError, match="no trainable parameter"):
        trainer(model=TinyNet().requires_grad_(False))


def test_sites_are_checked_before_training():
    sites = blob_sites()
    with pytest.raises(ValueError, match="at least one site"):
        federate(trainer(), [], rounds=1)
    with pytest.raises(ValueError, match=r"no patient to train on.*site-x"):
        federate(trainer(), [*sites, Site(name="site-x", train=[])], rounds=1)
    with pytest.raises(ValueError, match=r"unique.*site-0"):
        federate(trainer(), [sites[0], sites[0]], rounds=1)
    with pytest.raises(ValueError, match="rounds is a positive"):
        federate(trainer(), sites, rounds=0)


def test_a_failing_site_is_named_with_round_and_stage():
    sites = blob_sites()
    p = sites[1].train[0]
    unlabelled = Site(name="site-1", train=[Patient(p.id, p.image, None, p.affine)])
    with pytest.raises(SiteError, match=r"site-1.*round 0.*'equip'.*has no label") as caught:
        federate(trainer(), [sites[0], unlabelled], rounds=1, progress=False)
    assert (caught.value.site, caught.value.round, caught.value.stage) == ("site-1", 0, "equip")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    with pytest.raises(SiteError, match=r"crop .* is larger than patient"):
        federate(trainer(crop=(32, 32, 32)), sites, rounds=1, progress=False)


def test_a_nan_loss_says_what_to_do():
    sites = blob_sites((1,))
    p = sites[0].train[0]
    broken = Site(name="a", train=[Patient("x", torch.full_like(p.image, torch.nan), p.label, p.affine)])
    with pytest.raises(SiteError, match=r"'fit'.*loss is nan; .*learning rate"):
        federate(trainer(), [broken], rounds=1, progress=False)


def test_strategies_of_weights_differ_where_sites_differ():
    sites = blob_sites((4, 1))
    by_patients, uniform = (federate(trainer(), sites, strategy=FedAvg(weights=w), rounds=1, progress=False)
                            for w in ("patients", "uniform"))
    by_steps = federate(trainer(), sites, strategy=FedAvg(weights="steps"), rounds=1, progress=False)
    assert weights_sha256(by_patients.state.params) != weights_sha256(uniform.state.params)
    for name in uniform.state.params:  # both sites take three steps
        torch.testing.assert_close(by_steps.state.params[name], uniform.state.params[name])


def test_trainer_prints_as_code_and_runs_again_from_its_start():
    made = trainer(model=segresnet(filters=8, seed=3), crop=(16, 16, 16))
    assert "model=segresnet(filters=8, dropout=0.0, seed=3)" in repr(made) and "steps=3" in repr(made)
    before = weights_sha256(made.initial())
    sites = blob_sites((1,))
    first = federate(made, sites, rounds=1, progress=False)
    assert weights_sha256(made.initial()) == before != weights_sha256(trainable(made.model))
    assert weights_sha256(federate(made, sites, rounds=1, progress=False).state.params) \
        == weights_sha256(first.state.params)


def test_precision_follows_the_hardware_only():
    cpu = torch.device("cpu")
    assert pick_precision("auto", cpu) is pick_precision("auto", cpu)
    assert pick_precision("bf16", cpu) is torch.bfloat16


def test_the_order_of_the_patients_follows_the_seed():
    """With the crop as large as the volume and nothing augmented, only the order differs."""
    site = blob_sites((6,))[0]
    one = trainer(steps=6, batch_size=1, crop=tuple(site.train[0].image.shape[1:]))
    start = ServerState(round=0, params=one.initial())

    def order(seed):
        kit = one.prepare(site, start, site_state=SiteState(owner="optimiser"), seed=seed)
        return [next(k for k, patient in enumerate(site.train) if torch.equal(patient.image.float(), image[0]))
                for image, _ in kit.loader]

    orders = [order(seed) for seed in range(4)]
    assert all(sorted(found) == list(range(6)) for found in orders)
    assert order(2) == orders[2] and len(set(map(tuple, orders))) > 1


def test_the_loss_of_a_round_is_the_mean_over_its_steps():
    site, one, losses = blob_sites((4,))[0], trainer(steps=3), []
    start = ServerState(round=0, params=one.initial())
    kit = one.prepare(site, start, site_state=SiteState(owner="optimiser"), seed=0)
    backward = kit.backward

    def noted(*given):
        losses.append(backward(*given))
        return losses[-1]

    kit.backward = noted
    update = one.fit(kit, site, start, site_state=SiteState(owner="optimiser"), seed=0)
    assert len(set(losses)) == 3 and update.metrics["loss"] == pytest.approx(sum(losses) / 3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_trains_too():
    history = federate(trainer(device="cuda", precision="auto"), blob_sites(), rounds=2, progress=False)
    assert all(t.device.type == "cpu" for t in history.state.params.values())
