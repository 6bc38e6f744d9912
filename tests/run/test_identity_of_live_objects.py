"""What a run itself writes into its objects does not make it another run; what a user changes does."""

from __future__ import annotations

import pytest

from cohorts import blob_sites
from fedlab.core.errors import RunError
from fedlab.core.weights import weights_sha256
from fedlab.privacy.dp.site_level import LocalGaussian
from fedlab.run.federate import federate
from fedlab.run.trace import verify
from trainers import trainer


class Logs(LocalGaussian):
    """Keeps a private log, and has a private setting."""

    def __init__(self, *, factor=1.0):
        super().__init__(clip=1.0, noise_multiplier=0.5, delta=1e-3)
        self._factor, self._log = factor, []

    def protect(self, update, state, rng):
        self._log.append((update.site, state.round, float(update.norm())))
        return super().protect(update.map(lambda t: t * self._factor), state, rng)


@pytest.fixture
def go_on(tmp_path):
    def run(technique, *, rounds, folder="run"):
        return federate(trainer(), blob_sites(), privacy=technique, rounds=rounds, progress=False,
                        checkpoint=tmp_path / folder, trace=tmp_path / folder / "trace.jsonl")
    return run


def test_a_private_log_does_not_make_it_another_run(go_on, tmp_path):
    """The run goes on with the same object, to the bits of the run that was never interrupted, noise included."""
    technique = Logs()
    go_on(technique, rounds=1)
    resumed = go_on(technique, rounds=3)
    assert [entry[:2] for entry in technique._log] == [(f"site-{k}", n) for n in range(3) for k in range(2)]
    whole = go_on(Logs(), rounds=3, folder="whole")
    assert weights_sha256(resumed.state.params) == weights_sha256(whole.state.params)
    assert resumed.spent().equals(whole.spent()) and verify(tmp_path / "run").ok
    assert len(go_on(technique, rounds=4).records) == 4
    assert len(go_on(Logs(), rounds=5).records) == 5  # as in a new process


def test_a_log_does_not_hide_another_setting(go_on):
    technique = Logs()
    go_on(technique, rounds=1)
    technique._factor = 0.5
    with pytest.raises(RunError, match=r"other settings or data .*privacy\.settings\._factor: 1\.0 there, 0\.5 here"):
        go_on(technique, rounds=2)
    with pytest.raises(RunError, match=r"privacy\.settings\._factor"):
        go_on(Logs(factor=0.5), rounds=2)
    technique._factor = 1.0
    assert len(go_on(technique, rounds=2).records) == 2


def test_a_log_of_another_run_is_noticed(go_on):
    technique = Logs()
    go_on(technique, rounds=1)
    go_on(technique, rounds=1, folder="other")
    with pytest.raises(RunError, match=r"privacy\.settings\._log"):
        go_on(technique, rounds=2)


def test_a_run_that_breaks_off_goes_on_too(tmp_path):
    class Stop(Exception):
        pass

    def stop(finished):
        raise Stop

    technique, settings = Logs(), dict(checkpoint=tmp_path / "run", progress=False, rounds=2)
    with pytest.raises(Stop):
        federate(trainer(), blob_sites(), privacy=technique, on_round=stop, **settings)
    assert len(federate(trainer(), blob_sites(), privacy=technique, **settings).records) == 2
