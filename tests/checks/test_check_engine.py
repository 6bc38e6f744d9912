"""check_engine() accepts the engines of fedlab and names what is wrong with broken ones."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from cohorts import blob_sites
from fedlab.checks.engine import check_engine
from fedlab.core.errors import FedlabError, SiteError
from fedlab.core.types import Failure, Update, Withdrawal
from fedlab.engines.processes import Processes
from fedlab.faults.sites import Faulty
from fedlab.run.local import Local
from trainers import trainer

NAMES = ("engine", "bits", "noise", "memory", "personal layers", "exchange", "workflows", "order", "isolation",
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


def test_what_is_no_check_and_what_is_no_engine_is_refused():
    with pytest.raises(ValueError, match=r"only holds some of 'bits', 'noise'.*got 'bits'"):
        check_engine(Local, only="bits")
    with pytest.raises(ValueError, match=r"only holds some of .*got \('speed',\)"):
        check_engine(Local, only=("speed",))
    with pytest.raises(ValueError, match=r"failed  engine: .* has no run and no exchange and no memory"):
        check_engine(object)


# Each of these has one defect; the check that must name it stands beside it.


class Backwards(Local):
    def run(self, task, state, cohort):
        return super().run(task, state, cohort[::-1])


class OtherSeed(Local):
    def run(self, task, state, cohort):
        return super().run(replace(task, seed=task.seed + 1), state, cohort)


class ForgetsTheFirst(Local):
    def run(self, task, state, cohort):
        return super().run(task, state, cohort[1:])


class Half(Local):
    """Sends updates in half the precision."""

    def run(self, task, state, cohort):
        for answer in super().run(task, state, cohort):
            yield answer.map(lambda t: t.half().float()) if isinstance(answer, Update) else answer


class Chatty(Local):
    """Adds a number of its own."""

    def run(self, task, state, cohort):
        for answer in super().run(task, state, cohort):
            yield replace(answer, metrics={**answer.metrics, "engine": 1.0}) if isinstance(answer, Update) else answer


class NoMoments(Local):
    def run(self, task, state, cohort):
        return super().run(task, replace(state, moments={}), cohort)


class NoMemory(Local):
    """Every round begins with an empty memory, but for what privacy needs."""

    def run(self, task, state, cohort):
        for site in cohort:
            memory = self.memory.setdefault(site.name, {})
            for group in set(memory) - {"joined", "ledger"}:
                del memory[group]
            yield from super().run(task, state, [site])


class LosesMoments(Local):
    """Secrets of the moment don't reach the round."""

    def run(self, task, state, cohort):
        for site in cohort:
            memory = self.memory.setdefault(site.name, {})
            for group in [group for group in memory if group.startswith("_")]:
                del memory[group]
            yield from super().run(task, state, [site])


class OneModel(Local):
    def run(self, task, state, cohort):
        return super().run(task, replace(state, models={}), cohort)


class OneMemory(Local):
    """All sites share what they remember."""

    def run(self, task, state, cohort):
        shared = self.memory.setdefault(cohort[0].name, {})
        for site in cohort:
            self.memory[site.name] = shared
        return super().run(task, state, cohort)


class Swallows(Local):
    """Nothing is said of a site that failed."""

    def run(self, task, state, cohort):
        return (answer for answer in super().run(task, state, cohort) if not isinstance(answer, Failure))


class StopsAtAFailure(Local):
    def run(self, task, state, cohort):
        for answer in super().run(task, state, cohort):
            yield answer
            if isinstance(answer, Failure):
                return


class WrongStage(Local):
    def run(self, task, state, cohort):
        for answer in super().run(task, state, cohort):
            if isinstance(answer, Failure) and isinstance(answer.error, SiteError):
                yield Failure(answer.site, SiteError(answer.site, state.round, "reach", answer.error.reason))
            else:
                yield answer


class HidesTheReason(Local):
    def run(self, task, state, cohort):
        for answer in super().run(task, state, cohort):
            yield Failure(answer.site, FedlabError("a worker failed")) if isinstance(answer, Failure) else answer


class DeadAfterAFailure(Local):
    dead = False

    def run(self, task, state, cohort):
        for answer in super().run(task, state, cohort):
            self.dead = self.dead or isinstance(answer, Failure)
            yield answer if not self.dead or isinstance(answer, Failure) else Failure(
                answer.site, FedlabError("the worker is gone"))


class BudgetIsFailure(Local):
    def run(self, task, state, cohort):
        for answer in super().run(task, state, cohort):
            yield Failure(answer.site, FedlabError(answer.reason)) if isinstance(answer, Withdrawal) else answer


class FirstTask(Local):
    """Goes on with the task that it saw first."""

    task = None

    def run(self, task, state, cohort):
        self.task = self.task or task
        return super().run(self.task, state, cohort)


class StartsClean(Local):
    """Unlike Local it forgets the sites when a run begins."""

    def run(self, task, state, cohort):
        if state.round == 0:
            for memory in self.memory.values():
                memory.pop("optimiser", None)
        return super().run(task, state, cohort)


class KeepsElsewhere(Local):
    """What sites remember is in no attribute that a checkpoint could save."""

    def __init__(self):
        super().__init__()
        self.inner = Local()

    def run(self, task, state, cohort):
        return self.inner.run(task, state, cohort)

    def exchange(self, task, step, inboxes, sites):
        return self.inner.exchange(task, step, inboxes, sites)


class ChangesPatients(Local):
    def run(self, task, state, cohort):
        for site in cohort:
            site.train[0].image.clamp_(max=2.0)
        return super().run(task, state, cohort)


class ReusesTheUpdate(Local):
    """Hands the state's own tensors on and works in them."""

    def run(self, task, state, cohort):
        yield from super().run(task, state, cohort)
        for p in state.params.values():
            p.mul_(1 + 1e-6)


class Tired(Local):
    """Breaks down without a word of its own."""

    def run(self, task, state, cohort):
        raise ConnectionResetError("the server hung up")


class Unordered(Local):
    """Whoever is first is handed on first."""

    def run(self, task, state, cohort):
        found = []
        for answer in super().run(task, state, cohort):
            found.append((time.perf_counter(), answer))
        return iter([answer for _, answer in sorted(found, key=lambda pair: getattr(pair[1], "seconds", 0.0))])


BROKEN = [
    (Backwards, "order"), (Unordered, "order"), (OtherSeed, "bits"), (OtherSeed, "noise"), (ForgetsTheFirst, "bits"),
    (Half, "bits"), (Chatty, "bits"), (NoMemory, "bits"), (NoMoments, "memory"), (NoMemory, "personal layers"),
    (LosesMoments, "exchange"), (OneModel, "workflows"), (OneMemory, "isolation"), (Swallows, "failure"),
    (StopsAtAFailure, "failure"), (WrongStage, "failure"), (HidesTheReason, "failure ends the run"),
    (DeadAfterAFailure, "failure ends the run"), (BudgetIsFailure, "withdrawal"), (FirstTask, "again"),
    (StartsClean, "again"), (KeepsElsewhere, "resume"), (ChangesPatients, "untouched"), (ReusesTheUpdate, "untouched"),
    (Tired, "bits")]


@pytest.mark.parametrize(("kind", "check"), BROKEN, ids=lambda value: getattr(value, "__name__", value))
def test_a_broken_engine_is_found(kind, check):
    with pytest.raises(ValueError, match=f"(?s)1 failed.*failed  {check}: .*→ "):
        check_engine(kind, only=(check,))
