"""The one way an update leaves a site."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from fedlab.core.errors import PrivacyError
from fedlab.core.gate import check_update
from fedlab.core.kit import Kit
from fedlab.core.protocols import Strategy
from fedlab.core.seeds import derive, generator
from fedlab.core.types import ServerState, Site, SiteState, Update
from fedlab.core.weights import weights_sha256
from fedlab.privacy.accounting.ledger import Ledger
from fedlab.privacy.aggregation import Aggregation, shown_sha256
from fedlab.privacy.base import Privacy, technique_at
from fedlab.privacy.noise.streams import noise_generator, noise_stream
from fedlab.run.recipe import Json, patients_sha256, recipe_sha256, sha256_of
from fedlab.run.site_errors import as_site_error
from fedlab.run.under_guarantee import under_guarantee
from fedlab.strategies.averaging import FedAvg
from fedlab.training.trainer import SiteTrainer

__all__ = ["SiteTask", "SiteWork"]


@dataclass(eq=False)
class SiteWork:
    """The live objects of a site at work in a round; an error carries them as `FedlabError.work`.

    Attributes:
        site, state, site_state: the site, the server's state that it was shown, and its own.
        trainer: of the run.
        stage: what the site is doing, as in `SiteError`.
        kit: model, optimiser, loader and loss, as the techniques have wrapped them so far; None before "equip".
        guarded: whether a guarantee covers the run, so that no text about patients is shown.
    """

    site: Site
    state: ServerState
    site_state: SiteState
    trainer: SiteTrainer
    guarded: bool
    stage: str = "ledger"
    kit: Kit | None = None


@dataclass(frozen=True, kw_only=True)
class SiteTask:
    """Equip, train, protect, mask, check: the task that an engine runs at a site in a round, wherever that site is.

    Args:
        trainer: trains locally.
        privacy: protects the update.
        seed: of the run; the streams of a site and round derive from it. See `secure_mode` in `Privacy`.
        strategy: may change the training at a site; see `Strategy.equip`.
        aggregation: hides the update, if sums are secure.
        identity: the recipes of these parts when the run began, if they are known; the noise depends on them.
    """

    trainer: SiteTrainer
    privacy: Privacy
    seed: int
    strategy: Strategy = field(default_factory=FedAvg)
    aggregation: Aggregation = field(default_factory=Aggregation)
    identity: Mapping[str, Json] | None = None

    @property
    def guarded(self) -> bool:
        """Whether a formal guarantee covers the run."""
        return bool(self.privacy.units or self.privacy.works_at_server or self.aggregation.units)

    @cached_property
    def _recipe(self) -> str:
        if self.identity is not None:
            return sha256_of([self.identity[name] for name in ("trainer", "strategy", "privacy", "aggregation")])
        return self._recipe_with(self.privacy)

    def _recipe_with(self, privacy: Privacy) -> str:
        """Of all that changes an update at a site at which these techniques work."""
        return recipe_sha256([self.trainer, self.strategy, privacy, self.aggregation])

    def __call__(self, site: Site, state: ServerState, site_state: SiteState) -> Update:
        """The protected update of `site`; `site_state` is changed in place.

        Raises:
            SiteError: the site failed; the cause is chained to it.
            PrivacyBudgetExhausted: the site takes no further part; nothing is returned.
            PrivacyError: a technique failed or gave something unsafe; nothing is returned.
        """
        privacy, state = technique_at(self.privacy, site.name), state.at(site.name)
        seed = derive(self.seed, "site", site.name, state.round)
        work = SiteWork(site, state, site_state, self.trainer, self.guarded)
        started = time.perf_counter()
        try:
            site_state.round, site_state.broadcast = state.round, dict(state.broadcast)
            site_state.shown = shown_sha256(state) if self.aggregation.hides_updates else ""
            ledger, stream = self._open_ledger(privacy, site, state, site_state, seed)

            work.stage = "equip"
            kit = work.kit = self.trainer.prepare(site, state, site_state=site_state.of("optimiser"), seed=seed)
            kit.seed = stream  # of whatever a technique draws
            kit = work.kit = self.strategy.equip(kit, site, state, site_state.of("strategy"))
            kit = work.kit = privacy.equip(kit, site, site_state.of("privacy"))

            work.stage = "fit"
            try:
                update = self.trainer.fit(kit, site, state, site_state=site_state.of("optimiser"), seed=seed)
            finally:
                kit.close()
            trained = weights_sha256(update.delta) if ledger else ""
            update = replace(update, metrics={}) if ledger else update

            work.stage = "protect"
            rng = noise_generator(stream, "protect", trained) if ledger else generator(stream, "protect")
            update = privacy.protect(update, site_state.of("privacy"), rng)
            update = self.aggregation.mask(update, site_state.of("aggregation"), rng)

            work.stage = "check"
            update = replace(check_update(update, like=state.params, buffers=state.buffers, site=site.name),
                             round=state.round)
            if update.buffers and (self.guarded or self.aggregation.hides_updates):
                raise PrivacyError("no guarantee covers the network's buffers and no mask hides them, nor averaged "
                                   "moments; say SiteTrainer(buffers='keep', momentum='keep', ...)")
            if ledger:
                ledger = Ledger(site_state)
                ledger.bind(trained)
                update = under_guarantee(update, state.params, ledger, [privacy, self.aggregation])
            site_state.updates += 1

            work.stage = "remember"
            self.strategy.remember(self.trainer, site, state, update, site_state.of("strategy"), seed)
            _check_namespaces(site_state)
            # Time grows with patients, and with the patients drawn: under a guarantee it stays at the site too.
            return replace(update, seconds=0.0 if self.guarded else time.perf_counter() - started)
        except Exception as error:
            raised = as_site_error(error, site=site.name, round=state.round, stage=work.stage, guarded=self.guarded)
            raised.work = work
            raise raised from error

    def _open_ledger(self, privacy: Privacy, site: Site, state: ServerState, site_state: SiteState, seed: int
                     ) -> tuple[Ledger | None, int]:
        """The site's ledger, if a technique needs one, and the seed of the noise.

        Noise depends on everything that the update depends on: the weights, the training, the protection, the
        patients, and what the site remembers; noise that is added to the update depends on the update too. A run with
        other settings or patients gets other noise, and both are charged; so does a server that sends other weights
        under a round's number.
        """
        if not privacy.units | self.aggregation.units:
            return None, seed
        if not site_state.enrolled and not site_state.ledger and state.round > 0:
            raise PrivacyError("this site has no state from the rounds before, so the privacy spent is unknown; "
                               "restore its state, or begin a new run")
        if site_state.updates > 0 and not site_state.ledger:
            raise PrivacyError("this site has sent updates before but its ledger is missing; restore it")
        groups = {**site_state.namespaces, "broadcast": site_state.broadcast}
        remembered = {f"{owner}|{name}": t for owner, slots in groups.items() for name, t in slots.items()}
        known = self._recipe if privacy is self.privacy else self._recipe_with(privacy)
        stream = noise_stream(self.seed, site.name, state.round, weights_sha256(state.params),
                              weights_sha256(remembered), known, patients_sha256(site.train))
        return Ledger.open(site_state, site=site.name, round=state.round, stream=str(stream)), stream


def _check_namespaces(site_state: SiteState) -> None:
    for owner, slots in site_state.namespaces.items():
        for name, value in slots.items():
            if not isinstance(name, str) or not isinstance(value, torch.Tensor):
                raise TypeError(f"state.own of {owner!r} holds tensors by name, got {type(value).__name__} under "
                                f"{name!r}; keep torch.tensor(...)")
