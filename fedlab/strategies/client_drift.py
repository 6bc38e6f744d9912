"""Strategies that change how sites train: a pull towards the global model, control variates, personal models.

Their terms are added to the gradient right before the site's optimiser steps. Under DP-SGD that is after clipping and
noise: the terms hold nothing of a patient that has not been protected, so they need neither, and are not clipped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from fedlab.core.kit import Kit
from fedlab.core.protocols import Run, Trainer
from fedlab.core.settings import check_positive, check_whole, check_within
from fedlab.core.types import ServerState, Site, SiteState, Tensors, Update
from fedlab.core.weights import trainable
from fedlab.strategies.averaging import FedAvg, UniformAvg, moved, sgd_settings

__all__ = ["SCAFFOLD", "Ditto", "FedProx"]

_CONTROL = "control variate"  # of the server, in ServerState.moments
_PERSONAL, _BUFFERS = "model|", "buffers|"  # prefixes of the names under which Ditto keeps a site's own model


@dataclass(frozen=True, kw_only=True)
class FedProx(FedAvg):
    """Local training that is pulled back to where it began (Li et al., MLSys 2020, arXiv 1812.06127).

    Each site minimises its loss plus mu/2 times the squared distance from the weights that its round began with, which
    helps where sites differ and train long between rounds. `FedNova` corrects for different amounts of work. With mu=0
    it is FedAvg.

    Args:
        mu: strength of the pull. With plain SGD mu times the learning rate must stay below 2; the paper tries 0.001-1.

    Raises:
        ValueError: a mu that is negative or infinite.
    """

    mu: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_within(mu=self.mu)

    def equip(self, kit: Kit, site: Site, state: ServerState, site_state: SiteState) -> Kit:
        if self.mu > 0:
            _pull(kit, self.mu, to=None)
        return kit


@dataclass(frozen=True, kw_only=True)
class SCAFFOLD(UniformAvg):
    """Control variates against client drift (Karimireddy et al., ICML 2020, arXiv 1910.06378, option II).

    Every step at a site is corrected by the difference between the mean gradient of all sites and the site's own, both
    from the round before. It helps where sites differ, train long and take part often. Needs plain SGD with a fixed
    number of steps; with equal sites, or in the first round, it is FedAvg.

    Nothing but the update leaves a site: the change of its control variate, which the paper also sends, is minus the
    server's control variate less the update per step and learning rate. Server and site compute it from the
    *protected* update, so a technique affects both alike. Broadcasts are twice as large. Noise on the mean enters the
    control variate too; then the expected number of updates counts, since noise does not hide the number received. A
    site whose update is refused has still moved its own, until a round in which all take part.

    Args:
        sites, steps, lr: number of all sites, and steps and learning rate of the trainer; read from the run.
        weights: "uniform", as in the paper: the server's control variate is the mean of all sites'.

    Raises:
        ValueError: a setting out of its range; before the first round settings that differ from the run's, an
            optimiser other than plain SGD, or updates that are hidden by masks.
    """

    one_server: ClassVar[bool] = True

    sites: int | None = None
    steps: int | None = None
    lr: float | Callable[[int], float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(optional=True, sites=self.sites, steps=self.steps)
        if not callable(self.lr):
            check_positive(optional=True, lr=self.lr)

    def bind(self, run: Run) -> SCAFFOLD:
        sgd = sgd_settings(run.trainer)
        if sgd is None or sgd["momentum"] or sgd["maximize"]:
            raise ValueError("SCAFFOLD reads the mean gradient from the update, which is possible for plain SGD and "
                             "not with moments; say SiteTrainer(optimiser=torch.optim.SGD, ...), or use FedProx")
        if run.trainer.steps is None:
            raise ValueError(f"SCAFFOLD needs the same number of steps at every site: say steps= in place of "
                             f"epochs={run.trainer.epochs}")
        found = {"sites": len(run.sites), "steps": run.trainer.steps, "lr": run.trainer.lr}
        if any(_differ(getattr(self, name), value, run.rounds) for name, value in found.items()):
            raise ValueError(f"{self!r} is not for this run, which has {found}; leave these settings out, they are "
                             "read from the run")
        if run.aggregation.hides_updates:
            raise ValueError(f"the protected update from which a site computes its control variate is hidden by "
                             f"{run.aggregation!r}; use SCAFFOLD without it, or FedProx with it")
        return replace(self, **found)

    def equip(self, kit: Kit, site: Site, state: ServerState, site_state: SiteState) -> Kit:
        server, own = self._controls(state, site_state.own)
        terms = {name: (c - own[name]).to(kit.device) for name, c in server.items()}
        _add_to_gradient(kit, lambda name, p: terms[name])
        return kit

    def remember(self, trainer: Trainer, site: Site, state: ServerState, update: Update, site_state: SiteState,
                 seed: int) -> None:
        server, own = self._controls(state, site_state.own)
        gradient = -1 / self._travel(state.round)
        site_state.own.update({
            name: (own[name].double() - c.double() + update.delta[name].double() * gradient).to(c.dtype)
            for name, c in server.items()})

    def step(self, state: ServerState, mean: Update) -> ServerState:
        # Noise at the server is sized for the expected cohort and hides who took part; an empty mean has no steps.
        sites = self.sites or 1
        arrived = sites * self.sample if mean.spent else mean.weight if mean.steps else 0.0
        share, gradient = arrived / sites, -1 / self._travel(state.round)
        server, _ = self._controls(state, {})
        control = {name: (c.double() * (1 - share) + mean.delta[name].double() * (share * gradient)).to(c.dtype)
                   for name, c in server.items()}
        after = super().step(state, mean)
        return replace(after, moments={**state.moments, _CONTROL: control})

    def _controls(self, state: ServerState, own: Tensors) -> tuple[Tensors, Tensors]:
        """The server's and the site's, zeros where there is none yet."""
        zeros = {name: torch.zeros_like(p) for name, p in state.params.items()}
        return state.moments.get(_CONTROL, zeros), own or zeros

    def _travel(self, round: int) -> float:
        """The distance that a gradient of 1 moves a weight in a round."""
        if self.steps is None or self.lr is None:
            raise ValueError(f"{self!r} is not bound to a run; pass it to federate(strategy=...), or give sites, steps "
                             "and lr")
        lr = self.lr(round) if callable(self.lr) else self.lr
        if not 0 < lr < float("inf"):
            raise ValueError(f"the learning rate of round {round} is {lr}, by which SCAFFOLD divides; end the run "
                             "before it reaches 0")
        return self.steps * lr


@dataclass(frozen=True, kw_only=True)
class Ditto(FedAvg):
    """A personal model for each site beside the global one (Li et al., ICML 2021, arXiv 2012.04221).

    After training the global model as in FedAvg, each site trains a model of its own, with the same optimiser and as
    many steps, on its loss plus lam/2 times the squared distance from the global weights that the round began with. It
    helps where no single model suits all sites, or some may be malicious. It doubles the training. lam=0 is training
    alone.

    The personal model stays in the site's state and in checkpoints. No privacy technique protects it: it is as private
    as the site's patients, so do not publish it.

    Args:
        lam: strength of the pull. With plain SGD lam times the learning rate must stay below 2; the paper tries 0.05-2.

    Raises:
        ValueError: a lam that is negative or infinite; before the first round personal layers, or averaged moments.
    """

    lam: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_within(lam=self.lam)

    def local(self, params: Tensors, site_state: SiteState) -> Tensors:
        """A site's own model from its state, such as `history.site_states["site-0"]`, and the global `params`.

        Before its first round that is the global model, such as `history.state.model`.
        """
        own = site_state.of("strategy").own
        return {**params, **_part(own, _PERSONAL), **_part(own, _BUFFERS)}

    def bind(self, run: Run) -> Ditto:
        if run.trainer.momentum == "average" or any(layer.keeps_tensors for layer in run.privacy.layers):
            raise ValueError("Ditto gives sites whole models and moments of their own: use it without PersonalLayers "
                             "(it would be pulled to untrained values) and with SiteTrainer(momentum='keep', ...)")
        return self

    def remember(self, trainer: Trainer, site: Site, state: ServerState, update: Update, site_state: SiteState,
                 seed: int) -> None:
        # The same seed as for the global model: with lam=0 this is bit-equal to the site training alone.
        own = site_state.own
        start = state.holding(self.local(state.model, site_state))
        moments = SiteState(namespaces={"optimiser": _part(own, "optimiser|"), "buffers": _part(own, _BUFFERS)},
                            owner="optimiser")
        kit = trainer.prepare(site, start, site_state=moments, seed=seed)
        if self.lam > 0:
            _pull(kit, self.lam, to=state.params)
        try:
            trained = trainer.fit(kit, site, start, site_state=moments, seed=seed)
        finally:
            kit.close()
        model = {**moved(start.params, trained.delta, 1.0), **trained.buffers}
        own.update({_PERSONAL + name: t for name, t in model.items()})
        own.update({"optimiser|" + name: t for name, t in moments.own.items()})
        own.update({_BUFFERS + name: t for name, t in moments.of("buffers").own.items()})


def _differ(given: Any, found: Any, rounds: int) -> bool:
    """Whether a setting was given and is not that of the run; schedules are compared by their values in its rounds."""
    if callable(given) and callable(found):
        return any(given(round) != found(round) for round in range(rounds))
    return given not in (None, found)


def _part(own: Tensors, prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): t for name, t in own.items() if name.startswith(prefix)}


def _pull(kit: Kit, strength: float, *, to: Tensors | None) -> None:
    """A term of the gradient towards these weights, or towards those found at the first step, after all techniques."""
    anchor: dict[str, torch.Tensor] = {} if to is None else {name: t.to(kit.device) for name, t in to.items()}

    def term(name: str, p: torch.Tensor) -> torch.Tensor:
        if name not in anchor:
            anchor[name] = p.clone()
        return (p - anchor[name]) * strength

    _add_to_gradient(kit, term)


def _add_to_gradient(kit: Kit, term: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    """Adds a term to every gradient right before each step of the site's own optimiser."""
    parameters = trainable(kit.model)

    @torch.no_grad()
    def add(optimiser: torch.optim.Optimizer, arguments: Any, settings: Any) -> None:
        for name, p in parameters.items():
            extra = term(name, p).to(p.dtype)
            p.grad = extra if p.grad is None else p.grad + extra

    kit.optimiser.register_step_pre_hook(add)
