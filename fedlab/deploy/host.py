"""What runs at a site: its patients, policy, ledger and state. A server exchanges bytes and plain text with it."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from fedlab.core.errors import FedlabError, PrivacyBudgetExhausted, PrivacyError, RunError, SiteError
from fedlab.core.files import locked, write_whole
from fedlab.core.text import counted, without_folders
from fedlab.core.types import Failure, ServerState, Site, Spent, Tensors, Withdrawal
from fedlab.deploy.messages import are_notes, limit_for, pack_answer, unpack_state, unpack_weights
from fedlab.deploy.plan import Plan
from fedlab.deploy.policy import SitePolicy
from fedlab.deploy.settings import read_settings, read_site
from fedlab.deploy.snapshots import SiteSnapshots
from fedlab.privacy.accounting.ledger import Ledger
from fedlab.privacy.accounting.ledger_file import LedgerFile
from fedlab.privacy.base import technique_at
from fedlab.run.federate import check_sites, make_run
from fedlab.run.site_errors import kind_of, own_text, whole_text
from fedlab.run.site_task import SiteTask

__all__ = ["SiteHost"]

#: Bytes of all messages to one site in a step of an exchange, at most.
_LARGEST_INBOX = 2**26


@dataclass(frozen=True, kw_only=True)
class _Run:
    """A run that this site takes part in."""

    name: str
    plan: Plan
    task: SiteTask
    start: Tensors
    snapshots: SiteSnapshots


class SiteHost:
    """A site at work: begins a run that its policy allows, trains in its rounds, and keeps its ledger and state.

    The folder belongs to one process at a time. It holds `ledger/`, `states/` and `site.log`, which records in plain
    words what was asked and answered, and why something failed; these reasons stay at the site.

    Args:
        site: its patients.
        folder: made if missing.
        policy: what it allows.
        techniques: folder of approved technique files; `techniques/` in the folder by default.

    Raises:
        RunError: another process is using the folder.
    """

    def __init__(self, *, site: Site, folder: Path | str, policy: SitePolicy | None = None,
                 techniques: Path | str | None = None) -> None:
        self.site, self.folder = site, Path(folder)
        self.policy = policy or SitePolicy()
        self.techniques = Path(techniques or self.folder / "techniques")
        self._run: _Run | None = None
        self._places: list[Path] = [self.folder, self.techniques]  # of which no message to the server tells the parents
        self._guarded = False  # whether a guarantee covers the run that is beginning or has begun
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = ExitStack()
        self._lock.enter_context(locked(self.folder / ".lock", RunError(
            f"another process is using the site's folder {self.folder}; stop it first: two would spend one budget and "
            "overwrite each other's state")))

    @classmethod
    def open(cls, folder: Path | str, *, progress: bool = True) -> SiteHost:
        """The site of a folder made by `fedlab site init`; reads and prepares its patients, with a progress bar.

        Raises:
            RunError: no site's folder, or one in use.
            DataError: its patients cannot be used.
            ValueError: an invalid setting in site.toml.
        """
        settings = read_settings(folder)
        host = cls(site=Site(name=settings.name, train=[]), folder=folder, policy=settings.policy)
        host._places += [place for place in (settings.data, settings.table, settings.card) if place is not None]
        try:
            host.site = read_site(settings, cache=host.folder / "prepared", progress=progress)
        except BaseException:
            host.close()
            raise
        host._log(f"opened with {counted(len(host.site.train), 'patient')} to train on, {len(host.site.val)} held out")
        return host

    def begin(self, plan_json: str, start: bytes) -> None:
        """Takes part in a run from now on, if policy and plan allow it; repeated for the same run it changes nothing.

        Args:
            plan_json: of `Plan.to_json`.
            start: the first weights, of `pack_weights`.

        Raises:
            PrivacyError: the policy of this site refuses, or the plan needs something that is not approved.
            FedlabError: an invalid plan, other weights than it names, or parts that do not work together here.
        """
        self._guarded = False
        try:
            plan = Plan.from_json(plan_json)
            if self._run is not None and self._run.name == plan.run:
                return
            first = unpack_weights(start)
            task = self._task(plan, first)
            snapshots = SiteSnapshots(self.folder / "states" / plan.run, site=self.site.name, run=plan.run)
        except PrivacyError as error:
            self._log(f"refused a run: {whole_text(error)}")
            raise PrivacyError(f"{self.site.name} refuses: {self._own(error) or 'its log says why'}") from error
        except Exception as error:
            self._log(f"could not begin a run: {whole_text(error)}")
            raise self._error_for_server(error, "begin") from error
        self._run = _Run(name=plan.run, plan=plan, task=task, start=first, snapshots=snapshots)
        self._log(f"begins run {plan.run}: {plan.rounds} rounds of {len(plan.sites)} sites, {task.privacy!r}, "
                  f"{task.aggregation!r}, {task.strategy!r}, {task.trainer!r}")

    def train(self, run: str, state: bytes) -> bytes:
        """This site's packed answer to a packed state of the run; a failure is returned in it, never raised."""
        round = None
        try:
            begun = self._begun(run)
            shown = unpack_state(state, limit=4 * limit_for(begun.start))
            round = shown.round
            _check_state(shown, begun)
            self._log(f"round {round}: training")
            packed = self._work(begun, shown, hashlib.sha256(state).hexdigest())
            self._log(f"round {round}: answered with {len(packed)} bytes")
            return packed
        except PrivacyBudgetExhausted as error:
            self._log(f"round {round}: withdrawn: {whole_text(error)}")
            return pack_answer(Withdrawal(self.site.name, self._own(error) or "the reason stays in the site's log"))
        except Exception as error:
            self._log(f"round {round}: failed: {whole_text(error)}")
            return pack_answer(Failure(self.site.name, self._error_for_server(error, "keep", round or 0)))

    def exchange(self, run: str, step: str, inbox: Mapping[str, bytes]) -> dict[str, bytes]:
        """This site's messages, by recipient, in answer to those in its inbox, by sender; see `Aggregation.answer`.

        Raises:
            FedlabError: an unknown step, invalid messages, or a refusal by the aggregation.
        """
        try:
            begun = self._begun(run)
            aggregation = begun.task.aggregation
            if step not in aggregation.steps:
                raise PrivacyError(f"the run's aggregation has no step {str(step)[:40]!r}")
            if not are_notes(inbox, begun.plan.sites) or sum(map(len, inbox.values())) > _LARGEST_INBOX:
                raise PrivacyError("an inbox holds short messages of the run's sites, by name; this one does not")
            sent = aggregation.answer(step, self.site.name, dict(inbox), begun.snapshots.with_secrets())
            begun.snapshots.save_sums()  # before the answer leaves
            return {str(name): bytes(message) for name, message in sent.items()}
        except Exception as error:
            self._log(f"exchange {str(step)[:40]!r} failed: {whole_text(error)}")
            raise self._error_for_server(error, "exchange") from error

    def spent(self) -> tuple[Spent, ...]:
        """The privacy spent in all runs, by this site's ledger on disk."""
        file = LedgerFile(self.folder / "ledger", self.site.name)
        return file.read().spent() if file.path.is_file() else ()

    def close(self) -> None:
        """Releases the folder for other processes."""
        self._run = None
        self._lock.close()

    def __enter__(self) -> SiteHost:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<SiteHost of {self.site!r} in {self.folder}>"

    def _task(self, plan: Plan, start: Tensors) -> SiteTask:
        """The site's task in a run, after all checks that are possible before the first round."""
        parts = plan.parts(start, **self.policy.access(self.techniques))
        self.policy.check_plan(plan, parts["privacy"], parts["aggregation"], site=self.site.name)
        here = technique_at(parts["privacy"], self.site.name)
        self.policy.check_work(parts["trainer"], [parts["strategy"], *here.layers, parts["aggregation"]],
                               patients=len(self.site.train))
        run = make_run(**parts)
        self._guarded = run.guarded
        check_sites(run, [self.site])
        return cast("SiteTask", run.task)

    def _work(self, begun: _Run, state: ServerState, digest: str) -> bytes:
        """Trains, and packs the update once ledger and count on disk account for it."""
        self._count(begun, state.round, digest, enter=False)
        site_state = begun.snapshots.before(state.round)
        self.policy.check_round(state, site_state)
        with LedgerFile(self.folder / "ledger", self.site.name).kept(site_state):
            update = begun.task(self.site, state, site_state)
            self.policy.check_sent(update)
            self.policy.check_spent(Ledger(site_state) if site_state.ledger else None)
            packed = pack_answer(update)
            self._count(begun, state.round, digest, enter=True)
        begun.snapshots.save(site_state, state.round)
        return packed

    def _count(self, begun: _Run, round: int, digest: str, *, enter: bool) -> None:
        """Counts the updates that leave this site, and the different models that they answer.

        An update that is asked for again may be another one, with other noise: every update counts.
        """
        known = self._answers()
        of_run = known.setdefault(begun.name, [])
        of_run.append(f"{round}:{digest[:32]}")
        for name, most, count, what in (
                ("max_rounds", self.policy.max_rounds, len(set(of_run)), "different models in a run"),
                ("max_updates", self.policy.max_updates, sum(map(len, known.values())), "times in all runs")):
            if most is not None and count > most:
                raise PrivacyBudgetExhausted(f"{name}: {self.site.name} answers at most {most} {what}, this would be "
                                             f"number {count}")
        if enter:
            self._answers_file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._answers_file, json.dumps(known).encode())

    @property
    def _answers_file(self) -> Path:
        return self.folder / "ledger" / "answers.json"

    def _answers(self) -> dict[str, list[str]]:
        """The model that each update of this site answers, as "round:hash", by run."""
        path = self._answers_file
        try:
            known: dict[str, list[str]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            if not all(isinstance(answers, list) for answers in known.values()):
                raise ValueError("expected a list of answers per run")
        except (OSError, ValueError, AttributeError) as error:
            raise PrivacyError(f"{path} is damaged ({error}); restore it from a copy: it counts what this site has "
                               "answered") from error
        return known

    def _begun(self, run: str) -> _Run:
        if self._run is None or self._run.name != run:
            raise RunError(f"{self.site.name} has not begun run {str(run)[:64]!r}; send its plan first")
        return self._run

    def _error_for_server(self, error: Exception, stage: str, round: int = 0) -> FedlabError:
        """The error as the server receives it; the whole text stays in this site's log."""
        tells = self.policy.tell_errors and not self._guarded
        kind = next(kind for kind in type(error).__mro__ if kind.__module__ == FedlabError.__module__ or kind is object)
        if issubclass(kind, FedlabError) and not isinstance(error, SiteError) and (
                text := self._own(error) or (self._outside(error) if tells else "")):
            return kind(text)
        text = f"{kind_of(error)}; the text of the error stays in the site's log"
        if tells:
            text = error.reason if isinstance(error, SiteError) else f"{type(error).__name__}: {error}"
        stage = stage if getattr(error, "told", None) is None else error.stage  # type: ignore[attr-defined]
        return SiteError(self.site.name, round, stage, self._outside(text))

    def _own(self, error: Exception) -> str:
        """The text of an error that fedlab itself has written, about no patient; else empty."""
        told = getattr(error, "told", None)
        return self._outside((own_text(error) if told is None else told) or "")

    def _outside(self, text: object) -> str:
        """A text as it may leave this site: without the folders of its files."""
        return without_folders(str(text), self._places)

    def _log(self, text: str) -> None:
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {self.site.name}: {' '.join(text.split())}"
        try:
            with (self.folder / "site.log").open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")
        except OSError as error:  # on a full disk too the server gets an answer, and the site's staff the reason
            print(f"fedlab: {self.folder / 'site.log'} cannot be written ({error}); {line}", file=sys.stderr)


def _check_state(state: ServerState, begun: _Run) -> None:
    """Refuses a state of another model, of a round that the plan does not have, or with NaN in it."""
    if state.round >= begun.plan.rounds:
        raise PrivacyError(f"round {state.round} was asked for, the plan has {begun.plan.rounds}")
    trainer = begun.task.trainer
    own, buffers = ({name: (t.shape, t.dtype) for name, t in group.items()}
                    for group in (trainer.initial(), trainer.initial_buffers()))
    doubles = {name: (shape, torch.float64) for name, (shape, _) in own.items()}
    if not all(bool(torch.isfinite(t).all()) for t in state.broadcast.values()):
        raise PrivacyError("what the server broadcasts with the state holds NaN or infinite values")
    for what, group in (("params", state.params), ("buffers", state.buffers), *state.moments.items()):
        shapes = {name: (t.shape, t.dtype) for name, t in group.items()}
        if shapes != (buffers if what == "buffers" else own) and (what in ("params", "buffers") or shapes != doubles):
            raise PrivacyError(f"the tensors {what!r} of the state are not those of the run's model")
        if not all(bool(torch.isfinite(t).all()) for t in group.values()):
            raise PrivacyError(f"the tensors {what!r} of the state hold NaN or infinite values")
