"""The one way an update leaves a site."""

from __future__ import annotations

from dataclasses import dataclass

from fedlab.errors import FedlabError, PrivacyError, SiteError
from fedlab.privacy.base import Privacy, check_update
from fedlab.seeds import derive, generator
from fedlab.training import SiteTrainer
from fedlab.types import Memory, ServerState, Site, Update

__all__ = ["SiteTask"]


@dataclass(frozen=True, kw_only=True)
class SiteTask:
    """Equip, train, protect, check: what an engine runs at a site in a round, wherever that site is.

    Args:
        trainer: trains locally.
        privacy: protects what leaves.
        seed: of the run; the streams of a site and round are derived from it.
    """

    trainer: SiteTrainer
    privacy: Privacy
    seed: int

    def __call__(self, site: Site, state: ServerState, memory: Memory) -> Update:
        """The protected update of `site`; `memory` is what the site keeps, changed in place.

        Raises:
            SiteError: the site failed; the cause is chained to it.
            PrivacyError: a technique failed or gave something unsafe; nothing is returned.
        """
        seed = derive(self.seed, "site", site.name, state.round)
        stage = "equip"
        try:
            kit = self.trainer.prepare(site, state, memory=memory, seed=seed)
            kit = self.privacy.equip(kit, site, memory)
            stage = "fit"
            update = self.trainer.fit(kit, site, state, memory=memory, seed=seed)
            stage = "protect"
            protected = self.privacy.protect(update, memory, generator(seed, "protect"))
            stage = "check"
            return check_update(protected, like=state.params, site=site.name)
        except PrivacyError as error:
            raise PrivacyError(f"round {state.round}, {site.name}, {stage}: {error}; nothing was sent") from error
        except FedlabError:
            raise
        except Exception as error:
            raise SiteError(site.name, state.round, stage, f"{type(error).__name__}: {error}") from error
