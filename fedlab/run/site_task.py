"""The one way an update leaves a site."""

from __future__ import annotations

import hashlib
import re
import time
from dataclasses import dataclass, field, replace

import torch

from fedlab.core.errors import FedlabError, PrivacyBudgetExhausted, PrivacyError, SiteError
from fedlab.core.seeds import derive, generator
from fedlab.core.types import Memory, ServerState, Site, Tensors, Update
from fedlab.core.weights import weights_sha256
from fedlab.privacy.accounting.ledger import Ledger
from fedlab.privacy.base import Privacy, check_update
from fedlab.strategies.averaging import FedAvg, Strategy
from fedlab.training.trainer import SiteTrainer

__all__ = ["SiteTask", "enrol"]


def enrol(memory: Memory) -> None:
    """Marks the memory of a site that joins a run, so that one lost later is not taken for a new one."""
    memory.setdefault("joined", {"updates": torch.zeros((), dtype=torch.int64)})


@dataclass(frozen=True, kw_only=True)
class SiteTask:
    """Equip, train, protect, check: what an engine runs at a site in a round, wherever that site is.

    Args:
        trainer: trains locally.
        privacy: protects what leaves.
        seed: of the run; the streams of a site and round are derived from it. Whoever knows it can subtract the noise
            of techniques that draw from it: deployments say `secure_mode=True` in the technique.
        strategy: what it changes in the training at a site; see `Strategy.equip`.
    """

    trainer: SiteTrainer
    privacy: Privacy
    seed: int
    strategy: Strategy = field(default_factory=FedAvg)

    def __call__(self, site: Site, state: ServerState, memory: Memory) -> Update:
        """The protected update of `site`; `memory` is what the site keeps, changed in place.

        Raises:
            SiteError: the site failed; the cause is chained to it.
            PrivacyBudgetExhausted: the site takes no further part; nothing is returned.
            PrivacyError: a technique failed or gave something unsafe; nothing is returned.
        """
        here = self.privacy.at(site.name)
        if here is not self.privacy:
            return replace(self, privacy=here)(site, state, memory)
        seed = derive(self.seed, "site", site.name, state.round)
        state = state.at(site.name)
        started, stage = time.perf_counter(), "ledger"
        try:
            memory["broadcast"] = dict(state.memory.get("broadcast", {}))
            ledger, stream = self._open_ledger(site, state, memory, seed)
            stage = "equip"
            kit = self.trainer.prepare(site, state, memory=memory, seed=seed)
            kit.seed = stream  # of whatever a technique draws
            kit = self.strategy.equip(kit, site, state, memory)
            kit = self.privacy.equip(kit, site, memory)
            stage = "fit"
            try:
                update = self.trainer.fit(kit, site, state, memory=memory, seed=seed)
            finally:
                kit.close()
            stage = "protect"
            trained = weights_sha256(update.delta) if ledger else ""
            protected = self.privacy.protect(update, memory, generator(stream, "protect"))
            stage = "check"
            protected = replace(check_update(protected, like=state.params, site=site.name), round=state.round)
            if ledger:
                ledger = Ledger(memory)
                ledger.bind(trained)
                protected = self._state_spent(protected, ledger)
            memory["joined"] = {"updates": memory["joined"]["updates"] + 1}
            stage = "keep"
            self.strategy.keep(self.trainer, site, state, protected, memory, seed)
            # Time grows with patients, and with those that were drawn: under a guarantee it stays at home too.
            guarded = self.privacy.units or self.privacy.works_at_server
            return replace(protected, seconds=0.0 if guarded else time.perf_counter() - started)
        except PrivacyBudgetExhausted as error:
            raise PrivacyBudgetExhausted(f"{site.name} takes no part from round {state.round} on: {error}") from error
        except PrivacyError as error:
            raise PrivacyError(f"round {state.round}, {site.name}, {stage}: {error}; nothing was sent") from error
        except FedlabError:
            raise
        except Exception as error:
            raise SiteError(site.name, state.round, stage, f"{type(error).__name__}: {error}") from error

    def _open_ledger(self, site: Site, state: ServerState, memory: Memory, seed: int) -> tuple[Ledger | None, int]:
        """The site's ledger, if the technique needs one, and the seed of the noise.

        Noise depends on all that the update depends on: the weights, how is trained, how is protected, on whom, and
        what the site remembers. A run with other settings gets other noise, and both are charged; so does a server
        that sends other weights under a round's number.
        """
        if not self.privacy.units:
            enrol(memory)
            return None, seed
        if "joined" not in memory and "ledger" not in memory and state.round > 0:
            raise PrivacyError("this site has no memory of the rounds before, so nobody knows what it has spent; "
                               "restore its memory, or enrol it as a site that never took part")
        enrol(memory)
        if int(memory["joined"]["updates"]) > 0 and "ledger" not in memory:
            raise PrivacyError("this site has sent updates before but its ledger is missing; restore it")
        remembered = {f"{group}|{name}": t for group, slots in memory.items()
                      if group not in ("ledger", "joined") and not group.startswith("_") for name, t in slots.items()}
        settings = f"{self.trainer!r}\n{self.strategy!r}\n{self.privacy!r}"
        settings = re.sub(r" at 0x[0-9a-f]+", "", settings)  # same in another process
        stream = derive(seed, weights_sha256(state.params), weights_sha256(remembered), settings,
                        *(patient.id for patient in site.train))
        return Ledger.open(memory, site=site.name, model=_shape_of(state.params), round=state.round,
                           stream=str(stream)), stream

    def _state_spent(self, update: Update, ledger: Ledger) -> Update:
        """The update with what has been spent; numbers that no guarantee covers, such as the loss, stay at home."""
        unpaid = sorted(unit for unit in self.privacy.units if not ledger.charged(unit))  # type: ignore[arg-type]
        if unpaid:
            raise PrivacyError(f"{self.privacy!r} promises a guarantee per {' and per '.join(unpaid)} but entered "
                               "nothing into the ledger; charge it in equip() or protect()")
        return replace(update, spent=ledger.spent(), metrics={})


def _shape_of(params: Tensors) -> str:
    """A short name of a model's tensors and their shapes."""
    text = ";".join(f"{name}:{tuple(t.shape)}" for name, t in sorted(params.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
