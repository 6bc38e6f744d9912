"""check_engine() accepts the engines of fedlab and names what is wrong with broken ones."""

from __future__ import annotations

import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from cohorts import BatchNet, blob_sites
from fedlab.checks.engine import check_engine
from fedlab.core.errors import FedlabError, SiteError
from fedlab.core.types import Failure, SiteState, Update, Withdrawal
from fedlab.engines.processes import Processes
from fedlab.faults.sites import Faulty
from fedlab.run.local import Local
from fedlab.run.site_states import SiteStates
from trainers import trainer

NAMES = ("engine", "bits", "noise", "site states", "personal layers", "exchange", "workflows", "order", "isolation",
         "failure", "failure ends the run", "withdrawal", "again", "resume", "untouched")

pytestmark = pytest.mark.usefixtures("one_thread")


def test_local_passes_every_check():
    report = check_engine(Local)
    assert report and report.warned == () and tuple(finding.check for finding in report.findings) == NAMES


def test_processes_pass_every_check():
    report = check_engine(lambda: Processes(workers=2))
    assert report and report.subject == "Processes(workers=2)" and len(report.findings) == len(NAMES)


def test_an_engine_around_another_passes_with_a_trainer_and_sites_of_one_s_own():
    assert check_engine(lambda: Faulty(engine=Local(), faults=[]), trainer=trainer(), sites=blob_sites((1, 2, 1)),
                        only=("bits", "exchange", "resume"))


def test_an_engine_that_was_made_before_passes():
    engine = Local()
    assert check_engine(lambda: engine, only=("again", "resume", "failure ends the run"))


def test_what_the_given_trainer_does_not_allow_anywhere_is_not_tried():
    normed = trainer(model=BatchNet(), crop=(8, 8, 8))
    report = check_engine(Local, trainer=normed, sites=blob_sites((3, 2)), only=("bits", "noise", "exchange"))
    assert report and report.warned == ("noise", "exchange")
    assert "not tried: not fit for patient-level privacy" in str(report)


def test_what_is_no_check_and_what_is_no_engine_is_refused():
    with pytest.raises(ValueError, match=r"only holds some of 'bits', 'noise'.*got 'bits'"):
        check_engine(Local, only="bits")
    with pytest.raises(ValueError, match=r"only holds some of .*got \('speed',\)"):
        check_engine(Local, only=("speed",))
    with pytest.raises(ValueError, match=r"failed  engine: .* has no train and no exchange"):
        check_engine(object)


# Each of these has one defect; the check that must name it stands beside it.


class Backwards(Local):
    def train(self, task, state, cohort, states):
        return super().train(task, state, cohort[::-1], states)


class OtherSeed(Local):
    def train(self, task, state, cohort, states):
        return super().train(replace(task, seed=task.seed + 1), state, cohort, states)


class ForgetsTheFirst(Local):
    def train(self, task, state, cohort, states):
        return super().train(task, state, cohort[1:], states)


class Half(Local):
    """Sends updates in half the precision."""

    def train(self, task, state, cohort, states):
        for answer in super().train(task, state, cohort, states):
            yield answer.map(lambda t: t.half().float()) if isinstance(answer, Update) else answer


class Chatty(Local):
    """Adds a number of its own."""

    def train(self, task, state, cohort, states):
        for answer in super().train(task, state, cohort, states):
            yield replace(answer, metrics={**answer.metrics, "engine": 1.0}) if isinstance(answer, Update) else answer


class NoMoments(Local):
    def train(self, task, state, cohort, states):
        return super().train(task, replace(state, moments={}), cohort, states)


class NoMemory(Local):
    """Every round begins with an empty state, but for what privacy needs."""

    def train(self, task, state, cohort, states):
        for site in cohort:
            known = states[site.name]
            states.save(site.name, SiteState(enrolled=known.enrolled, updates=known.updates, ledger=known.ledger))
            yield from super().train(task, state, [site], states)


class LosesSecrets(Local):
    """The keys of the round do not reach the training."""

    def train(self, task, state, cohort, states):
        for site in cohort:
            states.with_secrets(site.name).secrets.clear()
            yield from super().train(task, state, [site], states)


class OneModel(Local):
    def train(self, task, state, cohort, states):
        return super().train(task, replace(state, models={}), cohort, states)


class OneMemory(Local):
    """All sites share one state."""

    def train(self, task, state, cohort, states):
        shared = SimpleNamespace(working=lambda site: states.working(cohort[0].name))
        return super().train(task, state, cohort, shared)


class Swallows(Local):
    """Nothing is said of a site that failed."""

    def train(self, task, state, cohort, states):
        return (answer for answer in super().train(task, state, cohort, states) if not isinstance(answer, Failure))


class StopsAtAFailure(Local):
    def train(self, task, state, cohort, states):
        for answer in super().train(task, state, cohort, states):
            yield answer
            if isinstance(answer, Failure):
                return


class WrongStage(Local):
    def train(self, task, state, cohort, states):
        for answer in super().train(task, state, cohort, states):
            if isinstance(answer, Failure) and isinstance(answer.error, SiteError):
                yield Failure(answer.site, SiteError(answer.site, state.round, "reach", answer.error.reason))
            else:
                yield answer


class HidesTheReason(Local):
    def train(self, task, state, cohort, states):
        for answer in super().train(task, state, cohort, states):
            yield Failure(answer.site, FedlabError("a worker failed")) if isinstance(answer, Failure) else answer


class DeadAfterAFailure(Local):
    dead = False

    def train(self, task, state, cohort, states):
        for answer in super().train(task, state, cohort, states):
            self.dead = self.dead or isinstance(answer, Failure)
            yield answer if not self.dead or isinstance(answer, Failure) else Failure(
                answer.site, FedlabError("the worker is gone"))


class BudgetIsFailure(Local):
    def train(self, task, state, cohort, states):
        for answer in super().train(task, state, cohort, states):
            yield Failure(answer.site, FedlabError(answer.reason)) if isinstance(answer, Withdrawal) else answer


class FirstTask(Local):
    """Goes on with the task that it saw first."""

    task = None

    def train(self, task, state, cohort, states):
        self.task = self.task or task
        return super().train(self.task, state, cohort, states)


class KeepsTheLastRun(Local):
    """A run begins with the moments that the run before it has left."""

    kept = None

    def train(self, task, state, cohort, states):
        for site in cohort:
            if state.round == 0 and self.kept is not None:
                states.save(site.name, self.kept[site.name])
        self.kept = states
        return super().train(task, state, cohort, states)


class KeepsElsewhere(Local):
    """What sites keep lies where no checkpoint saves it."""

    def __init__(self):
        super().__init__()
        self.own = None

    def train(self, task, state, cohort, states):
        if self.own is None or state.round == 0:
            self.own = SiteStates([site.name for site in cohort])
        return super().train(task, state, cohort, self.own)


class ChangesPatients(Local):
    def train(self, task, state, cohort, states):
        for site in cohort:
            site.train[0].image.clamp_(max=2.0)
        return super().train(task, state, cohort, states)


class ReusesTheUpdate(Local):
    """Hands the state's own tensors on and works in them."""

    def train(self, task, state, cohort, states):
        yield from super().train(task, state, cohort, states)
        for p in state.params.values():
            p.mul_(1 + 1e-6)


class Tired(Local):
    """Breaks down without a word of its own."""

    def train(self, task, state, cohort, states):
        raise ConnectionResetError("the server hung up")


class Unordered(Local):
    """Whoever is first is handed on first."""

    def train(self, task, state, cohort, states):
        found = []
        for answer in super().train(task, state, cohort, states):
            found.append((time.perf_counter(), answer))
        return iter([answer for _, answer in sorted(found, key=lambda pair: getattr(pair[1], "seconds", 0.0))])


BROKEN = [
    (Backwards, "order"), (Unordered, "order"), (OtherSeed, "bits"), (OtherSeed, "noise"), (ForgetsTheFirst, "bits"),
    (Half, "bits"), (Chatty, "bits"), (NoMemory, "bits"), (NoMoments, "site states"),
    (NoMemory, "personal layers"),
    (LosesSecrets, "exchange"), (OneModel, "workflows"), (OneMemory, "isolation"), (Swallows, "failure"),
    (StopsAtAFailure, "failure"), (WrongStage, "failure"), (HidesTheReason, "failure ends the run"),
    (DeadAfterAFailure, "failure ends the run"), (BudgetIsFailure, "withdrawal"), (FirstTask, "again"),
    (KeepsTheLastRun, "again"), (KeepsElsewhere, "resume"), (ChangesPatients, "untouched"),
    (ReusesTheUpdate, "untouched"), (Tired, "bits")]


@pytest.mark.parametrize(("kind", "check"), BROKEN, ids=lambda value: getattr(value, "__name__", value))
def test_a_broken_engine_is_found(kind, check):
    with pytest.raises(ValueError, match=f"(?s)1 failed.*failed  {check}: .*→ "):
        check_engine(kind, only=(check,))
