"""Averages of updates: by patients, by steps, uniform, and normalised by the length of each site's path."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from fedlab.core.kit import Kit
from fedlab.core.protocols import Run, Trainer
from fedlab.core.settings import check_choice, check_positive, check_share, check_within
from fedlab.core.types import ServerState, Site, SiteState, Tensors, Update

__all__ = ["FedAvg", "FedNova", "NotFinite", "TooFewUpdates", "sgd_settings", "weighted_mean"]


class TooFewUpdates(ValueError):
    """Fewer updates were received than the strategy can combine."""


class NotFinite(ValueError):
    """The combined update would make the model NaN or infinite, though each update is finite."""


def weighted_mean(updates: Iterable[Update]) -> Update:
    """The mean of the updates by their weights, in float64 and with one update in memory at a time.

    Its weight is the sum of the weights. Of buffers of whole numbers, such as counts, it has the largest, and of the
    metrics the means of those that every update has.

    Raises:
        TooFewUpdates: there is no update.
        NotFinite: the mean is NaN or infinite.
    """
    total: dict[str, torch.Tensor] = {}
    metrics: dict[str, float] = {}
    weight, steps = 0.0, 0
    buffers: Tensors = {}
    for update in updates:
        tensors, buffers = {**update.delta, **update.buffers}, update.buffers
        if not total:
            total = {name: t.double() * update.weight if t.is_floating_point() else t for name, t in tensors.items()}
            metrics = {name: value * update.weight for name, value in update.metrics.items()}
        else:
            for name, t in tensors.items():
                if t.is_floating_point():
                    total[name].add_(t.double(), alpha=update.weight)
                else:
                    total[name] = torch.maximum(total[name], t)
            metrics = {name: value + update.metrics[name] * update.weight for name, value in metrics.items()
                       if name in update.metrics}
        weight += update.weight
        steps += update.steps
    if not total:
        raise TooFewUpdates("no update to combine: no site of the cohort answered")
    for name, t in total.items():
        if t.is_floating_point() and not torch.isfinite(t.div_(weight)).all():
            raise NotFinite(f"the mean of the updates is NaN or infinite in {name}: an update that is not finite, or "
                            "an update or a weight of extreme size, was combined")
    return Update(site="mean", delta={name: t for name, t in total.items() if name not in buffers}, weight=weight,
                  steps=steps, metrics={name: value / weight for name, value in metrics.items()},
                  buffers={name: total[name] for name in buffers})


@dataclass(frozen=True, kw_only=True)
class FedAvg:
    """Federated averaging (McMahan et al., AISTATS 2017, arXiv 1602.05629): the model moves to the mean of the sites'.

    It is hard to beat where sites are alike and rounds are short. Where they differ much, long local training pulls
    each site's model to its own optimum (client drift), which `FedProx`, `SCAFFOLD`, `FedNova` and `FedOpt` counter.

    Attributes:
        one_server: whether its sums hold only where all updates of a round meet at one server.
        takes_buffers: whether buffers, such as batch norm's statistics, may enter as their weighted mean.

    Args:
        weights: of an update in the mean: the site's training "patients" (as in the paper and in Li et al. 2019), the
            optimiser "steps" it took, or "uniform".
        server_lr: length of the server's step; 1 moves the model to the mean.
        sample: probability with which each site takes part in a round, independently of the others.

    Raises:
        ValueError: an unknown weighting, a server step that is not positive, or a probability outside (0, 1].

    Example:
        >>> sites = fl.make_cohort(sizes=(4, 4), held_out=1, shape=(32, 32, 32), spacing_mm=6.0)
        >>> trainer = fl.SiteTrainer(model=fl.public_model("collection"), steps=1, crop=(16, 16, 16))
        >>> fl.federate(trainer, sites, strategy=fl.FedAvg(weights="uniform"), rounds=2)
        <History: 2 of 2 rounds, loss ...; no formal guarantee>
    """

    one_server: ClassVar[bool] = False
    takes_buffers: ClassVar[bool] = True

    weights: Literal["patients", "steps", "uniform"] = "patients"
    server_lr: float = 1.0
    sample: float = 1.0

    def __post_init__(self) -> None:
        check_choice(("patients", "steps", "uniform"), weights=self.weights)
        check_positive(server_lr=self.server_lr)
        check_share(sample=self.sample)

    def bind(self, run: Run) -> FedAvg:
        return self

    def begin(self, params: Tensors) -> ServerState:
        return ServerState(round=0, params={name: p.detach().clone() for name, p in params.items()})

    @property
    def uniform_mean(self) -> bool:
        """Whether every update counts the same, a condition of noise that is added to the mean.

        False where `combine` or `_weight` is overridden: a strategy that still takes the plain mean says so by
        overriding this.
        """
        return (self.weights == "uniform" and type(self).combine is FedAvg.combine
                and type(self)._weight is FedAvg._weight)

    @property
    def independent_draws(self) -> bool:
        """Whether each site is drawn independently with probability `sample`, which amplifies noise at the server.

        False where `select` is overridden: a strategy that still draws so says so by overriding this.
        """
        return type(self).select is FedAvg.select

    def select(self, sites: Sequence[Site], rng: torch.Generator) -> Sequence[Site]:
        if self.sample == 1:
            return sites
        chosen = torch.rand(len(sites), generator=rng, dtype=torch.float64) < self.sample
        return [site for site, taken in zip(sites, chosen.tolist(), strict=True) if taken]

    def equip(self, kit: Kit, site: Site, state: ServerState, site_state: SiteState) -> Kit:
        return kit

    def remember(self, trainer: Trainer, site: Site, state: ServerState, update: Update, site_state: SiteState,
                 seed: int) -> None: ...

    def combine(self, updates: Iterable[Update]) -> Update:
        return weighted_mean(replace(u, weight=self._weight(u)) for u in updates)

    def step(self, state: ServerState, mean: Update) -> ServerState:
        return replace(state, round=state.round + 1, params=moved(state.params, mean.delta, self.server_lr))

    def _weight(self, update: Update) -> float:
        if self.weights == "uniform":
            return 1.0
        return float(update.steps) if self.weights == "steps" else update.weight


@dataclass(frozen=True, kw_only=True)
class UniformAvg(FedAvg):
    """Averaging in which every update counts the same, since weights are claimed by their senders."""

    weights: Literal["patients", "steps", "uniform"] = "uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights != "uniform":
            raise ValueError(f"{type(self).__name__} counts every update the same: weights is 'uniform', got "
                             f"{self.weights!r}")


@dataclass(frozen=True, kw_only=True)
class FedNova(FedAvg):
    """Normalised averaging (Wang et al., NeurIPS 2020, arXiv 2007.07481).

    Where sites take different numbers of steps, as with `epochs`, the plain mean leans towards those that take more,
    beyond the weight of their patients. Here each update is divided by the length of its site's path, and the mean of
    these directions is multiplied by the mean length. With equal steps it is FedAvg. The length is known for SGD only.
    A site counts by the steps that it claims to have taken: not for sites that may be malicious.

    Args:
        momentum: of the sites' SGD, which must restart every round (`SiteTrainer(momentum="restart")`); read from the
            run.

    Raises:
        ValueError: a momentum outside [0, 1), or weights by steps, which the division would undo.
    """

    one_server: ClassVar[bool] = True

    momentum: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.momentum is not None:
            check_within(below=1, momentum=self.momentum)
        if self.weights == "steps":
            raise ValueError("FedNova itself divides by the steps: weights is 'patients' or 'uniform', got 'steps'")

    def bind(self, run: Run) -> FedNova:
        sgd = sgd_settings(run.trainer)
        if sgd is None or sgd["nesterov"] or sgd["dampening"] or not sgd["momentum"] < 1:
            found = "another" if sgd is None else f"SGD with {({k: v for k, v in sgd.items() if k != 'params'})}"
            raise ValueError("FedNova knows the path of torch.optim.SGD with a momentum below 1, no dampening and no "
                             f"Nesterov step; the trainer's optimiser is {found}; say optimiser=lambda p, lr: "
                             "torch.optim.SGD(p, lr, momentum=0.9)")
        if self.momentum not in (None, sgd["momentum"]):
            raise ValueError(f"FedNova(momentum={self.momentum:g}) is not for this run, whose sites train with "
                             f"momentum {sgd['momentum']:g}; leave momentum out, it is read from the run")
        if sgd["momentum"] > 0 and run.trainer.momentum != "restart":
            raise ValueError("FedNova counts the steps of one round: with momentum say "
                             "SiteTrainer(momentum='restart', ...)")
        return replace(self, momentum=float(sgd["momentum"]))

    def combine(self, updates: Iterable[Update]) -> Update:
        total = length = 0.0

        def per_step() -> Iterator[Update]:
            nonlocal total, length
            for update in updates:
                weight, own = self._weight(update), self._length(update.steps)
                total += weight
                length += weight * own
                yield replace(update, weight=weight, delta={n: t.double() / own for n, t in update.delta.items()})

        direction = weighted_mean(per_step())
        return direction.map(lambda t: t * (length / total))

    def _length(self, steps: int) -> float:
        """How often the gradients of these steps enter the update: the 1-norm of the paper's a_i."""
        steps, rho = max(1, steps), self.momentum or 0.0  # an update of no steps has nothing to divide
        return (steps - rho * (1 - rho**steps) / (1 - rho)) / (1 - rho)


def square_distance(one: Tensors, other: Tensors) -> float:
    """Squared Euclidean distance over all tensors of `one`; exact sums, so that their order does not matter."""
    return math.fsum(float((t.double() - other[name].double()).square().sum()) for name, t in one.items())


def moved(params: Tensors, delta: Tensors, length: float) -> dict[str, torch.Tensor]:
    """The weights after a step of `length` times `delta`, added in float64; raises `NotFinite` if they are not."""
    after = {name: p.double().add(delta[name].double(), alpha=length).to(p.dtype) for name, p in params.items()}
    for name, p in after.items():
        if not torch.isfinite(p).all():
            raise NotFinite(f"the model would become NaN or infinite in {name}; check the norms of the updates, and "
                            "lower the learning rates")
    return after


def sgd_settings(trainer: Trainer) -> dict[str, Any] | None:
    """The settings of the sites' optimiser if it is `torch.optim.SGD`, else None."""
    made = trainer.optimiser([nn.Parameter(torch.zeros(1))], 1.0)
    return made.param_groups[0] if type(made) is torch.optim.SGD else None
