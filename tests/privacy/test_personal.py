"""Personal layers stay at their site, are trained there, and nothing of them reaches the server."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from cohorts import TinyNet, blob_sites
from fedlab.core.errors import PrivacyError
from fedlab.core.types import SiteState, Update
from fedlab.core.weights import trainable, weights_sha256
from fedlab.privacy.base import Privacy
from fedlab.privacy.compression import Quantise, TopK
from fedlab.privacy.dp.dpsgd import DPSGD
from fedlab.privacy.dp.site_level import CentralGaussian, LocalGaussian
from fedlab.privacy.personal_layers import PersonalLayers, norms_and_head
from fedlab.run.federate import each_round, federate
from fedlab.strategies import FedAvg
from fedlab.training.networks import segresnet
from trainers import trainer

HEAD = PersonalLayers(names=["last.*"])
UNIFORM = FedAvg(weights="uniform")


class Sent(Privacy):
    """Keeps what leaves each site."""

    def __init__(self):
        self._updates = []

    def protect(self, update, state, rng):
        self._updates.append(update)
        return update


def head_of(state: SiteState) -> dict[str, torch.Tensor]:
    """The personal layers in a site's state, whether the technique stands alone or first in a sum."""
    return next(slots for owner, slots in state.namespaces.items() if owner in ("privacy", "privacy 0"))


@pytest.mark.parametrize("momentum", ["keep", "restart"])
def test_one_site_with_a_personal_head_is_plain_training(momentum):
    sites = blob_sites((2,))
    plain = federate(trainer(momentum=momentum), sites, rounds=3, progress=False)
    ours = federate(trainer(momentum=momentum), sites, rounds=3, privacy=HEAD, progress=False)
    local = HEAD.local(ours.state.params, ours.site_states["site-0"])
    for name, p in plain.state.params.items():
        torch.testing.assert_close(local[name], p, rtol=1e-5, atol=1e-6)
    first = trainer().initial()
    assert not torch.allclose(local["last.weight"], first["last.weight"], atol=1e-3)
    assert ours.state.params["last.weight"].equal(first["last.weight"])


def test_each_site_has_its_own_head_and_sends_nothing_of_it():
    sent, first = Sent(), trainer().initial()
    history = federate(trainer(), blob_sites(), rounds=3, privacy=HEAD + sent, progress=False)
    for update in sent._updates:
        assert not update.delta["last.weight"].any() and not update.delta["last.bias"].any()
        assert update.delta["first.weight"].any()
        assert update.nbytes == 4 * (6 * 4 * 27 + 6)
    heads = [head_of(history.site_states[site]) for site in ("site-0", "site-1")]
    assert [set(head) for head in heads] == [{"last.weight", "last.bias"}] * 2
    assert not torch.allclose(heads[0]["last.weight"], heads[1]["last.weight"], atol=1e-4)
    for name in ("last.weight", "last.bias"):
        assert history.state.params[name].equal(first[name])
    assert "no formal guarantee" in repr(history)
    for state in history.site_states.values():  # nothing else is kept than moments and the head
        assert {owner for owner, slots in state.namespaces.items() if slots} == {"optimiser", "privacy 0"}


def test_a_round_goes_on_from_the_head_of_the_round_before():
    class Start(Privacy):
        def __init__(self):
            self._heads = []

        def equip(self, kit, site, state):
            self._heads.append(trainable(kit.model)["last.weight"].detach().clone())
            return kit

    start = Start()
    run = each_round(trainer(), blob_sites((1, 1)), privacy=HEAD + start, rounds=2)
    states = next(run).site_states
    kept = [head_of(states[site])["last.weight"] for site in ("site-0", "site-1")]
    next(run)
    first = trainer().initial()["last.weight"]
    assert [h.equal(want) for h, want in zip(start._heads, [first, first, *kept], strict=True)] == [True] * 4


@pytest.mark.parametrize("rest", [
    LocalGaussian(clip=0.5, noise_multiplier=1.0), CentralGaussian(clip=0.5, noise_multiplier=1.0),
    TopK(keep=0.1, error_feedback=True), Quantise(bits=4)], ids=repr)
def test_the_global_model_keeps_its_head_whatever_comes_after(rest, tmp_path):
    first, technique = trainer().initial(), PersonalLayers(names=["last.*"]) + rest
    whole = federate(trainer(), blob_sites(), rounds=3, privacy=technique, strategy=UNIFORM, progress=False)
    for name in ("last.weight", "last.bias"):
        assert whole.state.params[name].equal(first[name])
    assert not whole.state.params["first.weight"].equal(first["first.weight"])
    for rounds in (1, 3):
        history = federate(trainer(), blob_sites(), rounds=rounds, privacy=technique, strategy=UNIFORM,
                           checkpoint=tmp_path / "run", progress=False)
    assert weights_sha256(history.state.params) == weights_sha256(whole.state.params)
    assert head_of(history.site_states["site-0"]).keys() == {"last.weight", "last.bias"}


def test_personal_layers_are_trained_privately_with_dp_sgd():
    first = trainer().initial()
    technique = HEAD + DPSGD(clip=0.5, noise_multiplier=1.0, delta=1e-2, batch=1)
    history = federate(trainer(), blob_sites((2, 2)), rounds=2, privacy=technique, progress=False)
    assert history.state.params["last.weight"].equal(first["last.weight"])
    assert not history.state.params["first.weight"].equal(first["first.weight"])
    heads = [head_of(state)["last.weight"] for state in history.site_states.values()]
    assert not heads[0].equal(first["last.weight"]) and not heads[0].equal(heads[1])
    assert "per patient" in history.guarantee()


def test_the_kept_head_is_a_copy_of_the_one_that_was_trained():
    one, site, state = trainer(), blob_sites((1,))[0], SiteState(owner="privacy")
    kit = HEAD.equip(one.prepare(site, FedAvg().begin(one.initial()), site_state=state.of("optimiser"), seed=0), site,
                     state)
    kit.close()
    wanted = kit.model.last.weight.detach().clone()
    with torch.no_grad():
        kit.model.last.weight.zero_()  # another site trains the same network
    assert head_of(state)["last.weight"].equal(wanted) and wanted.any()


def test_an_update_that_was_encoded_before_keeps_its_length():
    update = Update(site="a", delta={"first.weight": torch.ones(4), "last.weight": torch.ones(6)}, weight=1.0)
    rng = torch.Generator()
    assert HEAD.protect(update, SiteState(), rng).nbytes == 4 * 4
    assert HEAD.protect(replace(update, encoded=7), SiteState(), rng).nbytes == 7


def test_quantised_personal_layers_cost_a_scale_each():
    sent = Sent()
    federate(trainer(), blob_sites((1,)), rounds=1, privacy=HEAD + Quantise(bits=8) + sent, progress=False)
    assert sent._updates[0].nbytes == 6 * 4 * 27 + 6 + 4 * 4


def test_norms_and_head_are_found_in_the_networks_of_monai():
    from monai.networks.nets import BasicUNet, DynUNet, UNet

    model = segresnet()
    names = norms_and_head(model)
    assert names[-2:] == ["conv_final.2.conv.weight", "conv_final.2.conv.bias"]
    assert len([n for n, p in model.named_parameters() if "norm" in n]) == len(names) - 2 - 2  # conv_final.0 is one
    assert sum(p.numel() for n, p in model.named_parameters() if n in names) < 5000
    basic = BasicUNet(spatial_dims=3, in_channels=4, out_channels=3, features=(8,) * 6)
    assert norms_and_head(basic)[-1] == "final_conv.bias" and "conv_0.conv_0.adn.N.weight" in norms_and_head(basic)
    plain = UNet(spatial_dims=3, in_channels=4, out_channels=3, channels=(8, 16), strides=(2,))
    assert norms_and_head(plain) == ["model.2.conv.weight", "model.2.conv.bias"]
    dyn = DynUNet(spatial_dims=3, in_channels=4, out_channels=3, kernel_size=[3, 3, 3], strides=[1, 2, 2],
                  upsample_kernel_size=[2, 2], filters=[8, 8, 8])
    assert norms_and_head(dyn)[-2:] == ["output_block.conv.conv.weight", "output_block.conv.conv.bias"]
    assert norms_and_head(TinyNet()) == ["last.weight", "last.bias"]
    with pytest.raises(ValueError, match="no convolution"):
        norms_and_head(nn.GroupNorm(2, 4))


@pytest.mark.parametrize("names,match", [(["last.*", "head.*"], "no tensor of the model is called 'head"),
                                         (["*"], "nothing would be shared"), (["first*", "last*"], "local_only")])
def test_patterns_that_match_nothing_or_everything_are_refused(names, match):
    with pytest.raises(ValueError, match=match):
        each_round(trainer(), blob_sites(), privacy=PersonalLayers(names=names))


@pytest.mark.parametrize("names", ["last.*", [], [1], None])
def test_names_are_a_list(names):
    with pytest.raises(ValueError, match="list of names"):
        PersonalLayers(names=names)


def test_running_statistics_cannot_be_personal():
    class Normed(TinyNet):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm3d(6)

    with pytest.raises(ValueError, match="group or instance norm"):
        each_round(trainer(model=Normed()), blob_sites(), privacy=PersonalLayers(names=["norm.*"]))


def test_it_goes_before_what_wraps_the_model():
    class Wraps(Privacy):
        def equip(self, kit, site, state):
            return kit

    HEAD + Wraps()
    with pytest.raises(ValueError, match="put PersonalLayers before"):
        Wraps() + HEAD


def test_layers_of_another_run_or_damaged_ones_are_refused():
    first = next(each_round(trainer(), blob_sites((1,)), privacy=HEAD))
    with pytest.raises(PrivacyError, match="not those of this run"):
        next(each_round(trainer(), blob_sites((1,)), privacy=PersonalLayers(names=["last.bias"]), rounds=2,
                        state=first.state, site_states=first.site_states))
    delta = {name: torch.zeros_like(p) for name, p in trainer().initial().items()}
    delta["last.bias"] = torch.full_like(delta["last.bias"], float("nan"))
    with pytest.raises(PrivacyError, match="NaN"):
        HEAD.protect(Update(site="a", delta=delta, weight=1.0), SiteState(), torch.Generator())


def test_layers_of_a_site_that_failed_are_those_of_the_round_before():
    class Damage(Privacy):
        def protect(self, update, state, rng):
            if state.round == 1:
                update = replace(update, delta={**update.delta, "last.bias": update.delta["last.bias"] * float("nan")})
            return HEAD.protect(update, state, rng)

    run = each_round(trainer(), blob_sites((1,)), privacy=HEAD + Damage(), rounds=2)
    states = next(run).site_states
    before = head_of(states["site-0"])
    with pytest.raises(PrivacyError, match="personal layers of site-0 have NaN"):
        next(run)
    for name, value in head_of(states["site-0"]).items():
        assert value.equal(before[name])


def test_it_prints_as_the_code_that_makes_it():
    assert repr(HEAD) == "PersonalLayers(names=['last.*'])"
