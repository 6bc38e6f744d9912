"""The server's desk in one round: what is asked for, what comes in, and what is turned away."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from fedlab.core.errors import PrivacyBudgetExhausted, PrivacyError, RunError, SiteError
from fedlab.core.seeds import derive, generator
from fedlab.core.types import Cohort, Failure, Memory, ServerState, Site, Spent, Update, Withdrawal
from fedlab.core.weights import weights_sha256
from fedlab.privacy.base import Inboxes, PartialExchange, check_update
from fedlab.run.admission import Admission
from fedlab.run.local import Answer, Engine
from fedlab.run.site_task import SiteTask
from fedlab.strategies.averaging import NotFinite, TooFewUpdates
from fedlab.topologies.workflows import NoUpdates, Topology

__all__ = ["Desk"]


class Desk:
    """One round at the server. It trusts no engine and no site.

    Args:
        task: what runs at the sites.
        sites: all sites of the run.
        cohort: those drawn for this round.
        engine: where they work.
        admission: rules for sites that fail, or None: a failure is raised.
        state: before the round.

    Attributes:
        number: of the round.
        asked: names of the sites that were asked to train.
        seen: numbers of each update that was let in.
        spent: privacy spent, by site.
        absent: why a site's update is not in the model.
    """

    def __init__(self, task: SiteTask, sites: Sequence[Site], cohort: Sequence[Site], engine: Engine,
                 admission: Admission | None, state: ServerState) -> None:
        self.task, self.sites, self.cohort, self.engine = task, sites, cohort, engine
        self.admission, self.state, self.number = admission, state, state.round
        self.memory: Memory = {group: dict(tensors) for group, tensors in state.memory.items()}
        self.asked: list[str] = []
        self.seen: dict[str, dict[str, float]] = {}
        self.spent: dict[str, tuple[Spent, ...]] = {}
        self.absent: dict[str, str] = {}
        self._withdrawn: set[str] = set()
        self._copies: dict[str, int] = {}

    def run(self, topology: Topology) -> ServerState:
        """The state after the round.

        Raises:
            PrivacyBudgetExhausted: every site of the cohort has withdrawn.
            FedlabError: a site failed and no admission rules say what then.
            ValueError: fewer updates came than the strategy can combine, and no admission rules say what then.
        """
        strategy, names = self.task.strategy, [site.name for site in self.cohort]
        sends = [sender for sender, _ in topology.messages(names)]
        self._copies = {name: sends.count(name) for name in names}
        self._prepare()
        try:
            if not self.cohort:
                raise NoUpdates
            moved = topology(self.state, self.cohort, sites=self.sites, strategy=strategy, train=self.train,
                             release=self.release)
        except NoUpdates:
            moved = self._nothing_came()
        except (TooFewUpdates, NotFinite) as error:
            if self.admission is None:
                raise
            moved = self._void(str(error))
        if self.admission is not None and 0 < len(self.seen) < self.admission.min_sites:
            moved = self._void(f"{len(self.seen)} updates came, the round needs {self.admission.min_sites}")
        if not _finite(moved):
            # Every update was finite, but their sum, or a square of the server's optimiser, is not.
            if self.admission is None:
                raise RunError(f"after round {self.number} the model would hold NaN or infinite values; look at the "
                               "norms of its updates, and bound them with admission=Admission(max_norm=...)")
            moved = self._void("with what came the model would hold NaN or infinite values")
        kept = {group: tensors for group, tensors in self.memory.items() if not group.startswith("_")}
        return replace(moved, memory=kept)

    def train(self, state: ServerState, sites: Sequence[Site]) -> Iterator[Update]:
        """The updates of these sites that may enter the model, as they come."""
        waiting = {site.name for site in sites}
        self.asked += [site.name for site in sites]
        nothing = "it sent nothing"
        for answer in self.engine.run(self.task, state, sites):
            sender = getattr(answer, "site", None)
            if not isinstance(answer, Answer) or not isinstance(sender, str) or sender not in waiting:
                stray = f"an update of {sender!r}" if isinstance(sender, str) else "something that is no update"
                if self.admission is None:
                    raise ValueError(f"{stray} came; still expected were {sorted(waiting)}")
                nothing = f"it sent nothing under its name; {stray[:120]} came and was left out"
                continue
            waiting.remove(answer.site)
            if (reason := self._turn_away(answer, state)) is not None:
                self.absent[answer.site] = reason
            elif isinstance(answer, Update):
                self._note(answer)
                yield answer
        self.absent |= dict.fromkeys(waiting, nothing)
        if self._withdrawn and self._withdrawn >= {site.name for site in self.cohort}:
            raise PrivacyBudgetExhausted("no site is left: " + "; ".join(self.absent.values()))

    def release(self, mean: Update) -> Update:
        """What privacy techniques do to the mean before the model moves."""
        privacy, arrived = self.task.privacy, tuple(self.seen)
        inboxes = privacy.at_server("trained", {}, self.memory, arrived) if privacy.after else {}
        left = self._exchange(privacy.after, inboxes, [s for s in self.cohort if s.name in self.seen], arrived)
        for name, reason in left.items():  # its update is in the model all the same
            warnings.warn(f"{name} sent its update but fell out of the exchange of messages after it: {reason}",
                          stacklevel=2)
        took_part = Cohort(self.number, arrived, len(self.sites), self.task.strategy.sample)
        mean = privacy.unmask(mean, took_part, self.memory)
        # Noise that depends on what it is added to: two runs of one seed on other data never share it.
        seed = derive(self.task.seed, weights_sha256(mean.delta))
        out = privacy.release(mean, took_part, self.memory, generator(seed, "release", self.number))
        if out.spent:
            self.spent["server"] = out.spent
        return out

    def _turn_away(self, answer: Answer, state: ServerState) -> str | None:
        """Why an answer has no place in the model, or None."""
        if isinstance(answer, Withdrawal):
            self._withdrawn.add(answer.site)
            return answer.reason
        try:
            if isinstance(answer, Failure):
                raise answer.error
            check_update(answer, like=state.at(answer.site).params, site=answer.site)
            if answer.round != self.number:
                raise PrivacyError(f"the update of {answer.site} answers round {answer.round}, not {self.number}")
        except Exception as error:
            if self.admission is None:
                raise
            if isinstance(error, SiteError) and (self.task.privacy.units or self.task.privacy.works_at_server):
                # The text of an error may quote scans, losses or names of patients, which no guarantee covers.
                return f"it failed at stage {error.stage!r}; under a guarantee the reason stays at the site"
            return str(error)
        return None if self.admission is None else self.admission.refuse(answer)

    def _note(self, update: Update) -> None:
        size = update.nbytes * self._copies.get(update.site, 1)
        self.seen[update.site] = {**update.metrics, "norm": update.norm(), "weight": update.weight,
                                  "steps": float(update.steps), "bytes": float(size)}
        if update.seconds > 0:  # withheld under a guarantee
            self.seen[update.site]["seconds"] = update.seconds
        self.spent[update.site] = update.spent

    def _void(self, why: str) -> ServerState:
        """The model stays: what came is too little to move it."""
        self.absent |= {name: f"the round was void: {why}" for name in self.seen}
        self.seen.clear()
        return replace(self.state, round=self.number + 1)

    def _nothing_came(self) -> ServerState:
        """The model stays, but for noise that hides just that."""
        if not self.task.privacy.works_at_server:
            return self._void("no update came")
        nothing = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in self.task.trainer.initial().items()}
        return self.task.strategy.step(self.state, self.release(Update(site="mean", delta=nothing, weight=1.0)))

    def _prepare(self) -> None:
        """The exchange before training: who falls out of it isn't asked to train."""
        left = self._exchange(self.task.privacy.before, {}, self.cohort, ())
        self.asked += left
        self.absent |= left
        self.cohort = [site for site in self.cohort if site.name not in left]

    def _exchange(self, steps: Sequence[str], inboxes: Inboxes, sites: Sequence[Site],
                  arrived: Sequence[str]) -> dict[str, str]:
        """Messages between the sites, handed on by the server, one step after the other; who failed, and why.

        The technique decides whether those that are left are enough.
        """
        left: dict[str, str] = {}
        for step in steps:
            sites = [site for site in sites if site.name not in left]
            try:
                sent = self.engine.exchange(self.task, step, inboxes, sites)
            except PartialExchange as part:
                if self.admission is None:
                    raise part.failures[0].error from part
                sent = part.sent
                left |= {failure.site: self._turn_away(failure, self.state) or "it failed"
                         for failure in part.failures}
            inboxes = self.task.privacy.at_server(step, sent, self.memory, arrived)
        return left


def _finite(state: ServerState) -> bool:
    groups = (state.params, *state.models.values(), *state.moments.values())
    return all(bool(torch.isfinite(tensor).all()) for group in groups for tensor in group.values())
