"""Site-level differential privacy: clipped updates and Gaussian noise, at each site or at the server.

Noise is independent from round to round. Noise that cancels over the rounds (DP-FTRL, Kairouz et al. 2021, arXiv
2103.00039) helps if each record takes part once or seldom. A site takes part in most rounds, where it costs more than
it saves: for 10 to 100 rounds at an equal guarantee we measured an error of the running sums 1.4 to 1.7 times as large
with the square-root factorisation and 1.6 to 2.0 times with trees.

With `secure_mode` noise is exact on a public grid (`fedlab.privacy.noise.on_grid`). Without it noise is drawn in
floating point: ε is that of real numbers, and the low bits of what is released are outside the proof.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from fedlab.core.errors import PrivacyBudgetExhausted, PrivacyError
from fedlab.core.protocols import Run
from fedlab.core.settings import check_positive
from fedlab.core.types import Cohort, ServerState, SiteState, Spent, Tensors, Update
from fedlab.privacy.accounting.ledger import SITE_ZEROED, Accountant, Gaussian, Ledger, Terms
from fedlab.privacy.base import Privacy
from fedlab.privacy.dp.clipping import CLIPPING_NORM, AdaptiveClip, check_clip, clip_update, noise_beside_bits
from fedlab.privacy.noise.continuous import standard_normal
from fedlab.privacy.noise.on_grid import GaussianGrid

__all__ = ["CentralGaussian", "LocalGaussian"]

_BIT = "within_clip"
#: Sites of a run at most, where the sum of their updates lies on a grid.
_MOST_SITES = 2**14


class LocalGaussian(Privacy):
    """Each site clips its update and adds Gaussian noise before it leaves: a guarantee against the server too.

    Every coordinate gets noise of standard deviation `noise_multiplier` × `clip`. The guarantee is per site and holds
    for any two updates that the site could send, whatever its patients: they differ by at most 2 × `clip`, so the
    ledger enters half the noise multiplier. A site is charged in the rounds it takes part in; sampling of sites saves
    nothing, since the server sees who sent what. Any strategy may combine the updates.

    For a target ε over T rounds take 2 × `noise_multiplier_for(target_epsilon=…, delta=…, sample_rate=1, steps=T)`.
    With few sites that much noise usually drowns the model; `CentralGaussian` needs less and trusts the server more.

    Not covered: that a site takes part, its number of patients (`Update.weight`) and of steps; without `secure_mode`
    the low bits of floating point numbers: ε is that of real numbers. Losses stay at the site. Techniques after it in
    a `+` see only the noisy update, error feedback included, and cost nothing more. `SiteState.diagnostics` holds the
    norms before and after clipping and that of the noise; they stay at the site.

    Args:
        clip: clipping norm of the whole update, in the unit of the weights.
        noise_multiplier: standard deviation of the noise over `clip`.
        per_layer: see `clip_update`.
        delta, accountant, max_epsilon, secure_mode: see `Privacy`.

    Raises:
        ValueError: a setting is out of range.
    """

    units = frozenset({"site"})

    def __init__(self, *, clip: float, noise_multiplier: float, delta: float = 1e-5, per_layer: bool = False,
                 accountant: Accountant = "rdp", max_epsilon: float | None = None, secure_mode: bool = False) -> None:
        check_positive(clip=clip, noise_multiplier=noise_multiplier)
        check_positive(max_epsilon=max_epsilon, optional=True)
        self.clip, self.noise_multiplier, self.delta, self.per_layer = clip, noise_multiplier, delta, per_layer
        self.accountant, self.max_epsilon, self.secure_mode = accountant, max_epsilon, secure_mode
        self._release = Gaussian(noise_multiplier=noise_multiplier / 2)
        self._terms = Terms(unit="site", delta=delta, adjacency="any two updates of a site", accountant=accountant)
        self._grid()  # noise that cannot be exact is refused

    def check(self, run: Run) -> None:
        self._terms.check_delta(len(run.sites))
        self._terms.check_budget([self._release], self.max_epsilon)

    def least_spent(self, update: Update) -> Spent:
        return self._terms.spent([self._release])

    def protect(self, update: Update, state: SiteState, rng: torch.Generator) -> Update:
        Ledger(state).charge(self._release, terms=self._terms, max_epsilon=self.max_epsilon,
                              repeatable=not self.secure_mode)
        grid = self._grid()
        clip = self.clip if grid is None else grid.inner(_entries(update))
        clipped = clip_update(update, clip, per_layer=self.per_layer)
        if grid is None:
            noise = _noise(clipped.delta, self.noise_multiplier * self.clip, rng)
            noisy = {name: t.double() + noise[name] for name, t in clipped.delta.items()}
        else:
            noisy = grid.noised(clipped.delta)
            noise = {name: noisy[name] - t.double() for name, t in clipped.delta.items()}
        _note(state, update, clipped, noise)
        noisy = {name: noisy[name].to(t.dtype) for name, t in clipped.delta.items()}
        return replace(clipped, delta=noisy, encoded=None)  # noise fills every gap that a sparse code left out

    def _grid(self) -> GaussianGrid | None:
        return GaussianGrid(reach=self.clip, std=self.noise_multiplier * self.clip) if self.secure_mode else None


class CentralGaussian(Privacy):
    """DP-FedAvg: each site clips its update, the server adds Gaussian noise to their sum (McMahan et al. 2018).

    The server adds noise of standard deviation `noise_multiplier` × `clip` to the sum of the updates (arXiv
    1710.06963) and divides by the *expected* number of sites, sites × sample, which no site changes by being absent.
    The guarantee is per site, for all of its updates replaced by nothing; the number of sites is public. With
    `FedAvg(sample=q)` each site is drawn with probability q, which the accountant credits; a round in which no site is
    drawn gets noise too and is charged. The server's ledger outlives a run beside those of the sites, in the folder
    that an engine names: `Local(ledgers=...)`.

    It protects sites from everyone who sees the models: the other sites and the users of the result. The *server* is
    trusted: it sees each clipped update, and the sites are trusted to clip. `aggregation=SecureAggregation(...)`, with
    a fixed clip here, hides single updates from it. Sampling amplifies nothing towards an adversary who sees which
    sites were drawn or knows the seed of the run.

    Not covered: the server's own record of the run (`History.sites()`: who took part, norms and bits of single
    updates) and anything computed on a site's patients besides the update, such as validation; without `secure_mode`
    the low bits of floating point numbers: ε is that of real numbers. Losses and numbers of patients stay at the site,
    and every update has weight 1; numbers of steps leave.

    The strategy must be a plain mean with equal weights, `FedAvg(weights="uniform")`. Techniques that change updates
    go before this one in a `+`, since nothing may lengthen updates after clipping.

    Args:
        clip: clipping norm of the whole update, in the unit of the weights, or an `AdaptiveClip`.
        noise_multiplier: standard deviation of the noise over `clip`; see `noise_multiplier_for` with the strategy's
            sample as sample_rate and rounds as steps. With an `AdaptiveClip`, that of updates and bits together.
        per_layer: see `clip_update`.
        delta, accountant, max_epsilon, secure_mode: see `Privacy`.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(self, *, clip: float | AdaptiveClip, noise_multiplier: float, delta: float = 1e-5,
                 per_layer: bool = False, accountant: Accountant = "rdp", max_epsilon: float | None = None,
                 secure_mode: bool = False) -> None:
        check_positive(noise_multiplier=noise_multiplier)
        check_positive(max_epsilon=max_epsilon, optional=True)
        check_clip(clip, noise_multiplier=noise_multiplier, per_layer=per_layer)
        self.clip, self.noise_multiplier, self.delta, self.per_layer = clip, noise_multiplier, delta, per_layer
        self.accountant, self.max_epsilon, self.secure_mode = accountant, max_epsilon, secure_mode
        self._terms = Terms(unit="site", delta=delta, adjacency=SITE_ZEROED, accountant=accountant)
        self._grid(clip.start if isinstance(clip, AdaptiveClip) else clip)  # noise that cannot be exact is refused

    @property
    def sends(self) -> frozenset[str]:  # type: ignore[override]
        """With an `AdaptiveClip` the bit of each update, which the noise covers."""
        return frozenset({_BIT}) if isinstance(self.clip, AdaptiveClip) else frozenset()

    @property
    def noise_on_updates(self) -> float:
        """Standard deviation over `clip` of the noise on the sum of the updates; see `noise_beside_bits`."""
        return noise_beside_bits(self.clip, self.noise_multiplier)

    def check_order(self, *, before: Sequence[Privacy], after: Sequence[Privacy]) -> None:
        for other in after:
            if type(other).protect is not Privacy.protect or type(other).release is not Privacy.release:
                raise ValueError(f"put {other!r} before {type(self).__name__}: a technique that changes updates after "
                                 "they are clipped can make them longer than the noise covers")

    def check(self, run: Run) -> None:
        if getattr(run.strategy, "uniform_mean", False) is not True:
            raise ValueError(f"noise at the server is calibrated for a plain mean in which every update counts the "
                             f"same, which {run.strategy!r} is not; use FedAvg(weights='uniform'), or LocalGaussian, "
                             "which works with any strategy")
        sample = float(getattr(run.strategy, "sample", 1.0))
        if sample < 1 and getattr(run.strategy, "independent_draws", False) is not True:
            raise ValueError(f"sample={sample:g} is credited only if each site is drawn independently, which "
                             f"{run.strategy!r} does not claim; use FedAvg's own select, or sample=1")
        if self.secure_mode and len(run.sites) > _MOST_SITES:
            raise ValueError(f"exact noise covers sums of at most {_MOST_SITES} sites, the run has {len(run.sites)}; "
                             "say secure_mode=False for research, or join sites")
        self._terms.check_delta(len(run.sites))
        self._terms.check_budget([self._release(sample)], self.max_epsilon)

    def protect(self, update: Update, state: SiteState, rng: torch.Generator) -> Update:
        clip = self._clip_now(state.broadcast)
        grid = self._grid(clip)
        clipped = clip_update(update, clip if grid is None else grid.inner(_entries(update)), per_layer=self.per_layer)
        _note(state, update, clipped)
        bit = {_BIT: 0.5 if update.norm() <= clip else -0.5} if isinstance(self.clip, AdaptiveClip) else {}
        return replace(clipped, weight=1.0, metrics=bit)

    def release(self, mean: Update, cohort: Cohort, state: ServerState, rng: torch.Generator) -> Update:
        if cohort.round > 0 and not state.ledger:
            raise PrivacyError(f"round {cohort.round} begins without the server's ledger, so the privacy spent is "
                               "unknown; continue from a state that holds it, or begin a new run from these weights")
        ledger = Ledger(state)
        try:
            ledger.charge(self._release(cohort.sample), terms=self._terms, max_epsilon=self.max_epsilon,
                          repeatable=not self.secure_mode)
        except PrivacyBudgetExhausted as error:
            raise PrivacyBudgetExhausted(f"the server stops moving the model: {error}") from error
        expected, clip = cohort.sites * cohort.sample, self._clip_now(state.broadcast)
        total = {name: t.double() * len(cohort) for name, t in mean.delta.items()}
        grid = self._grid(clip)
        if grid is None:
            noise = _noise(total, self.noise_on_updates * clip, rng)
            noisy = {name: t + noise[name] for name, t in total.items()}
        else:
            noisy = grid.noised(total)
        if isinstance(self.clip, AdaptiveClip):
            if len(cohort) and _BIT not in mean.metrics:
                raise PrivacyError("the combined update lacks the bits that an AdaptiveClip follows; combine with "
                                   "fedlab.strategies.weighted_mean, and change no metrics after CentralGaussian")
            bits = self.clip.noised(mean.metrics.get(_BIT, 0.0) * len(cohort), None if self.secure_mode else rng)
            moved = self.clip.moved(clip, 0.5 + bits / expected)
            state.broadcast[CLIPPING_NORM] = torch.tensor(moved, dtype=torch.float64)
        delta = {name: t / expected for name, t in noisy.items()}
        return replace(mean, delta=delta, metrics={}, spent=ledger.spent())

    def _release(self, sample: float) -> Gaussian:
        return Gaussian(noise_multiplier=self.noise_multiplier, sample_rate=sample)

    def _grid(self, clip: float) -> GaussianGrid | None:
        """The grid of the sum of updates of a clipping norm, in `secure_mode`."""
        return GaussianGrid(reach=clip, std=self.noise_on_updates * clip,
                            terms=_MOST_SITES) if self.secure_mode else None

    def _clip_now(self, broadcast: Tensors) -> float:
        """The clipping norm of this round, the same at the server and its sites."""
        if not isinstance(self.clip, AdaptiveClip):
            return self.clip
        return float(broadcast.get(CLIPPING_NORM, self.clip.start))


def _entries(update: Update) -> int:
    return sum(t.numel() for t in update.delta.values())


def _noise(like: Tensors, std: float, rng: torch.Generator) -> Mapping[str, torch.Tensor]:
    """Gaussian noise, float64, drawn tensor by tensor in their order."""
    return {name: std * standard_normal(t.shape, rng) for name, t in like.items()}


def _note(state: SiteState, before: Update, clipped: Update, noise: Tensors | None = None) -> None:
    """Notes what the technique did, for the site only."""
    found = {"norm before clipping": before.norm(), "norm after clipping": clipped.norm()}
    if noise is not None:
        found["norm of the noise"] = replace(clipped, delta=noise).norm()
    state.diagnostics.update({name: torch.tensor(value, dtype=torch.float64) for name, value in found.items()})
