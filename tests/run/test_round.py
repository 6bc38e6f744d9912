"""One round is one readable function, and the same to the bit as a loop that is written out without fedlab.run."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch.utils.data import RandomSampler

from cohorts import TinyNet, blob_sites
from fedlab.core.convolution import FastConvolutions
from fedlab.core.seeds import derive, generator
from fedlab.core.weights import weights_sha256
from fedlab.faults.sites import DropOut, Faulty, Replay
from fedlab.privacy.base import Privacy
from fedlab.privacy.compression import TopK
from fedlab.privacy.personal_layers import PersonalLayers
from fedlab.run.admission import Admission
from fedlab.run.federate import each_round, federate
from fedlab.run.local import Local
from fedlab.run.round import one_round
from fedlab.strategies.averaging import FedAvg
from fedlab.strategies.client_drift import SCAFFOLD, Ditto
from fedlab.training.defaults import DiceBCE
from trainers import batches, plain_sgd, trainer


def test_one_round_reads_as_one_text():
    source = inspect.getsource(one_round)
    assert len(source.splitlines()) <= 40
    steps = ["run.select(", "aggregation.before(", "engine.train(", "arrivals.admit(", "_combine(",
             "aggregation.after(", "_release(", "strategy.step(", "arrivals.close("]
    places = [source.index(step) for step in steps]
    assert places == sorted(places)


class Scales(Privacy):
    """A factor at each site and another at the server."""

    def protect(self, update, state, rng):
        return update.map(lambda t: t * 0.7)

    def release(self, mean, cohort, state, rng):
        return mean.map(lambda t: t * 1.3)


def naive_training(params, site, moments, *, seed):
    """Three steps of AdamW over the site's whole volumes; the change of the weights."""
    model = TinyNet()
    model.load_state_dict(params)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=1e-5, fused=True)
    if site.name in moments:
        optimiser.load_state_dict(moments[site.name])
    order = list(RandomSampler(site.train, num_samples=6, generator=generator(seed, "order")))
    for image, target in batches(site.train, [order[0:2], order[2:4], order[4:6]]):
        optimiser.zero_grad()
        with FastConvolutions():  # the same products in another order: their last bits differ from torch's own
            loss = DiceBCE()(model(image), target)
        loss.backward()
        optimiser.step()
    moments[site.name] = optimiser.state_dict()
    return {name: p.detach() - params[name] for name, p in model.named_parameters()}


def naive_run(sites, *, rounds, seed, sample):
    """Federated averaging as in DESIGN's pseudo-code, with everything in memory."""
    params, moments = {name: p.detach().clone() for name, p in TinyNet().named_parameters()}, {}
    for number in range(rounds):
        drawn = torch.rand(len(sites), generator=generator(seed, "select", number), dtype=torch.float64) < sample
        cohort = [site for site, taken in zip(sites, drawn.tolist(), strict=True) if taken]
        updates = {}
        for site in cohort:
            delta = naive_training(params, site, moments, seed=derive(seed, "site", site.name, number))
            updates[site.name] = {name: t * 0.7 for name, t in delta.items()}  # protect
        patients = sum(len(site.train) for site in cohort)
        for name, p in params.items() if cohort else ():
            mean = sum(len(site.train) * updates[site.name][name].double() for site in cohort) / patients  # combine
            params[name] = (p.double() + mean * 1.3).float()  # release and step
    return params


def test_a_run_is_the_naive_loop_to_the_bit(one_thread):
    sites, settings = blob_sites((3, 2, 4)), dict(rounds=4, seed=5)
    ours = federate(trainer(), sites, strategy=FedAvg(sample=0.7), privacy=Scales(), progress=False, **settings)
    assert len({len(record["sites"]) for record in ours.records}) > 1  # rounds of different sites
    assert weights_sha256(ours.state.params) == weights_sha256(naive_run(sites, sample=0.7, **settings))


def test_a_round_taken_by_hand_is_that_of_the_run():
    whole = federate(trainer(), blob_sites(), rounds=3, progress=False)
    first = next(each_round(trainer(), blob_sites(), rounds=3))
    last = list(each_round(trainer(), blob_sites(), rounds=3, state=first.state, site_states=first.site_states))[-1]
    assert weights_sha256(last.state.params) == weights_sha256(whole.state.params)
    forgot = list(each_round(trainer(), blob_sites(), rounds=3, state=first.state))[-1]  # the optimiser's moments
    assert weights_sha256(forgot.state.params) != weights_sha256(whole.state.params)


@pytest.mark.parametrize("parts", [
    {}, {"strategy": SCAFFOLD()}, {"strategy": Ditto(lam=0.1)}, {"privacy": PersonalLayers(names=["last.*"])},
    {"privacy": TopK(keep=0.1, error_feedback=True)}], ids=repr)
@pytest.mark.parametrize("engine", [
    Local(), Faulty(engine=Local(), faults=[Replay(sites=("site-1",), rounds=(1, 2), disguised=True),
                                            DropOut(sites=("site-0",), rounds=(1,))])], ids=repr)
def test_a_second_run_on_one_engine_is_the_first_to_the_bit(engine, parts):
    """What sites keep (moments, control variates, personal layers, a fault's old update) belongs to the run."""
    settings = {"optimiser": plain_sgd} if "strategy" in parts else {"momentum": "keep"}
    first, second = (federate(trainer(**settings), blob_sites(), rounds=3, engine=engine, admission=Admission(),
                              progress=False, **parts) for _ in range(2))
    assert weights_sha256(first.state.params) == weights_sha256(second.state.params)
    assert first.site_states.folder != second.site_states.folder
    for site, state in first.site_states.items():
        other = second.site_states[site]
        assert state.namespaces.keys() == other.namespaces.keys() and state.namespaces
        for owner, slots in state.namespaces.items():
            assert weights_sha256(slots) == weights_sha256(other.namespaces[owner])


SCRIPT = textwrap.dedent("""
    import sys
    from pathlib import Path
    import torch
    from cohorts import TinyNet, blob_sites
    from fedlab.run.federate import federate
    from trainers import trainer

    class Large(TinyNet):
        def __init__(self):
            super().__init__()
            self.shift = torch.nn.Parameter(torch.zeros(1_250_000))

        def forward(self, image):
            return super().forward(image) + self.shift.mean()

    torch.set_num_threads(1)
    done = federate(trainer(model=Large(), steps=1), blob_sites((1,) * int(sys.argv[1])), rounds=2, progress=False)
    size = done.site_states.path("site-0").stat().st_size
    status = Path("/proc/self/status").read_text()  # getrusage would count the process that started this one too
    print(int(status.split("VmHWM:")[1].split()[0]) * 1024, size)
    """)


def test_what_is_not_at_work_lies_on_disk():
    """The peak memory of 24 sites that keep moments is about that of 2."""
    peaks = []
    for sites in (2, 24):
        out = subprocess.run([sys.executable, "-c", SCRIPT, str(sites)], capture_output=True, text=True, timeout=300,
                             env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]),
                                                                               str(Path(__file__).parents[2])])})
        assert out.returncode == 0, out.stderr
        peak, size = map(int, out.stdout.split())
        peaks.append(peak)
    assert size > 9e6  # two moments of 5 MB
    assert peaks[1] - peaks[0] < 3 * size  # in memory, 22 more states would be 220 MB
