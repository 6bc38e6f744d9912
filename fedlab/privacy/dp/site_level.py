"""Site-level differential privacy: clipped updates and Gaussian noise, at each site or at the server.

Noise is independent from round to round. Noise that cancels over the rounds (DP-FTRL, Kairouz et al. 2021, arXiv
2103.00039) pays where each record takes part once or seldom; a site takes part in most rounds, and then it costs more
than it saves: for 10 to 100 rounds at equal guarantee the error of the running sums came out 1.4 to 1.7 times as large
with the square-root factorisation and 1.6 to 2.0 times with trees.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from fedlab.core.errors import PrivacyBudgetExhausted, PrivacyError
from fedlab.core.types import Cohort, Memory, Site, Tensors, Update
from fedlab.privacy.accounting.ledger import Accountant, Gaussian, Ledger, Terms, epsilon_of
from fedlab.privacy.base import Privacy
from fedlab.privacy.noise.gaussian import standard_normal

if TYPE_CHECKING:
    from fedlab.strategies.averaging import Strategy
    from fedlab.training.trainer import SiteTrainer

__all__ = ["AdaptiveClip", "CentralGaussian", "LocalGaussian", "clip_update"]

#: Clipping aims this much below the norm, so that rounding to float32 cannot lift an update above it.
_MARGIN = 1e-6
_CLIP, _BIT = "clipping norm", "within_clip"


def clip_update(update: Update, clip: float, *, per_layer: bool = False) -> Update:
    """The update, scaled down to a Euclidean norm of at most `clip` if it is longer; untouched if not.

    Args:
        update: its tensors are float32 or float64; half precision becomes float32.
        clip: clipping norm, in the unit of the weights.
        per_layer: clip each of the L tensors to clip / √L of its own (McMahan et al. 2018, arXiv 1710.06963, "flat"
            and "per-layer" clipping), which keeps the whole within `clip` too.
    """
    bound = clip / math.sqrt(len(update.delta)) if per_layer else clip

    def shorter(t: torch.Tensor, norm: float) -> torch.Tensor:
        t = t if t.dtype in (torch.float32, torch.float64) else t.float()
        return t if norm <= bound else (t.double() * (bound / norm * (1 - _MARGIN))).to(t.dtype)

    whole = update.norm()
    return replace(update, delta={
        name: shorter(t, float(t.double().norm()) if per_layer else whole) for name, t in update.delta.items()})


class LocalGaussian(Privacy):
    """Each site clips its update and adds Gaussian noise before it leaves: nobody need be trusted, not even the server.

    Every coordinate gets noise of standard deviation `noise_multiplier` × `clip`. The guarantee is per site and holds
    for any two updates that the site could send, whatever its patients: they differ by at most 2 × `clip`, so the
    ledger enters half the noise multiplier. A site is charged in the rounds it takes part in, and choosing sites at
    random saves nothing, since the server sees who sent what. Any strategy may combine the updates.

    For a target ε over T rounds take 2 × `noise_multiplier_for(target_epsilon=…, delta=…, sample_rate=1, steps=T)`.
    With few sites that much noise usually drowns the model; `CentralGaussian` needs less and trusts the server more.

    Not covered: that a site takes part, its number of patients (`Update.weight`) and of steps. Losses stay at the
    site. What follows in a `+` only reads the noisy update, error feedback included, and costs nothing more.
    Memory group "diagnostics" keeps the norms before and after clipping and that of the noise; it stays at the site.

    Args:
        clip: clipping norm of the whole update, in the unit of the weights.
        noise_multiplier: standard deviation of the noise over `clip`.
        delta: of the guarantee, below 1 over the number of sites.
        per_layer: see `clip_update`.
        accountant: "rdp", "prv" or "gdp", which is exact here; see `Terms`.
        max_epsilon: the site's budget; it takes no further part rather than exceed it.
        secure_mode: noise from the operating system. Without it noise repeats with the seed of the run, and the
            server, which knows the seed, can subtract it: for research.

    Raises:
        ValueError: a setting out of its range.
    """

    units = frozenset({"site"})

    def __init__(self, *, clip: float, noise_multiplier: float, delta: float = 1e-5, per_layer: bool = False,
                 accountant: Accountant = "rdp", max_epsilon: float | None = None, secure_mode: bool = False) -> None:
        _check_positive(clip=clip, max_epsilon=max_epsilon)
        self.clip, self.noise_multiplier, self.delta, self.per_layer = clip, noise_multiplier, delta, per_layer
        self.accountant, self.max_epsilon, self.secure_mode = accountant, max_epsilon, secure_mode
        self._release = Gaussian(noise_multiplier=noise_multiplier / 2)
        self._terms = Terms(unit="site", delta=delta, adjacency="any two updates of a site", accountant=accountant)

    def check_run(self, *, trainer: SiteTrainer, sites: Sequence[Site], strategy: Strategy, rounds: int) -> None:
        _check_start(self._release, self._terms, self.max_epsilon, sites)

    def protect(self, update: Update, memory: Memory, rng: torch.Generator) -> Update:
        Ledger(memory).charge(self._release, terms=self._terms, max_epsilon=self.max_epsilon,
                              repeatable=not self.secure_mode)
        clipped = clip_update(update, self.clip, per_layer=self.per_layer)
        noise = _noise(clipped.delta, self.noise_multiplier * self.clip, None if self.secure_mode else rng)
        _note(memory, update, clipped, noise)
        noisy = {name: (t.double() + noise[name]).to(t.dtype) for name, t in clipped.delta.items()}
        return replace(clipped, delta=noisy, encoded=None)  # noise fills every gap that a sparse code left out


@dataclass(frozen=True, kw_only=True)
class AdaptiveClip:
    """A clipping norm that follows a quantile of the norms of the updates (Andrew et al. 2021, arXiv 1905.03871).

    Each site says, in one bit, whether its update was within the clipping norm. The server adds noise to the sum of
    the bits and moves the norm by a factor of exp(−lr × (noisy share − quantile)); it reaches the sites with the
    weights of the next round.

    Args:
        start: clipping norm of the first round, in the unit of the weights; too small costs a few rounds.
        bit_noise: standard deviation of the noise on the sum of the bits. It takes its part of the same privacy
            budget, so the updates get more noise: 3 % more at twice the noise multiplier. The paper takes a twentieth
            of the expected cohort, which suits hundreds of sites; it must exceed half the noise multiplier.
        quantile: share of updates that should be within the norm.
        lr: how fast the norm moves; the paper's 0.2 changes it by at most about 20 % a round.

    Raises:
        ValueError: a setting out of its range.
    """

    start: float
    bit_noise: float
    quantile: float = 0.5
    lr: float = 0.2

    def __post_init__(self) -> None:
        _check_positive(start=self.start, bit_noise=self.bit_noise, lr=self.lr)
        if not 0 < self.quantile < 1:
            raise ValueError(f"quantile is a share between 0 and 1, got {self.quantile}")

    def moved(self, clip: float, share: float) -> float:
        """The next clipping norm, after `share` of the updates (with noise) were within `clip`."""
        return clip * math.exp(-self.lr * (share - self.quantile))


class CentralGaussian(Privacy):
    """DP-FedAvg: each site clips its update, the server adds Gaussian noise to their sum (McMahan et al. 2018).

    The server adds noise of standard deviation `noise_multiplier` × `clip` to the sum of the updates (arXiv
    1710.06963) and divides by the *expected* number of sites, sites × sample, which no site changes by being absent.
    The guarantee is per site, for adding or removing all of one site's updates where the number of sites is public.
    With `FedAvg(sample=q)` each site is drawn with probability q, which the accountant credits; a round in which
    nobody is drawn gets noise too and is charged.

    Who is protected from whom: sites from everyone who sees the models, that is the other sites and users of the
    result. The *server* is trusted: it sees each clipped update, and the sites are trusted to clip. Add secure
    aggregation after this technique, with a fixed clip, to hide single updates from it. Whoever sees which sites were
    drawn, or knows the seed of the run, has no amplification by sampling; whoever knows the seed can subtract the
    noise, unless `secure_mode` is set.

    Not covered: the server's own record of the run (`History.sites()`: who took part, norms and bits of single
    updates) and anything computed on a site's patients besides the update, such as validation. Losses and
    numbers of patients stay at the site, and every update has weight 1; numbers of steps leave.

    The strategy must be a plain mean with equal weights, `FedAvg(weights="uniform")`; what changes updates goes before
    this technique in a `+`, since after clipping nothing may lengthen them.

    Args:
        clip: clipping norm of the whole update, in the unit of the weights, or an `AdaptiveClip`.
        noise_multiplier: standard deviation of the noise over `clip`; see `noise_multiplier_for` with the strategy's
            sample as sample_rate and rounds as steps. With an `AdaptiveClip`, that of updates and bits together.
        delta: of the guarantee, below 1 over the number of sites.
        per_layer: see `clip_update`.
        accountant: "rdp", "prv", or "gdp" where every site takes part every round; see `Terms`.
        max_epsilon: the budget of the run; it ends rather than exceed it.
        secure_mode: noise from the operating system instead of the seed of the run.

    Raises:
        ValueError: a setting out of its range.
    """

    def __init__(self, *, clip: float | AdaptiveClip, noise_multiplier: float, delta: float = 1e-5,
                 per_layer: bool = False, accountant: Accountant = "rdp", max_epsilon: float | None = None,
                 secure_mode: bool = False) -> None:
        Gaussian(noise_multiplier=noise_multiplier)
        if isinstance(clip, AdaptiveClip):
            if per_layer:
                raise ValueError("an AdaptiveClip follows the norm of the whole update: say per_layer=False, or give "
                                 "a fixed clip")
            if clip.bit_noise <= noise_multiplier / 2:
                raise ValueError(f"bit_noise must exceed half the noise multiplier ({noise_multiplier / 2:g}), got "
                                 f"{clip.bit_noise:g}: the bits alone would spend the privacy of the round; take "
                                 f"{2 * noise_multiplier:g}")
            _check_positive(max_epsilon=max_epsilon)
        else:
            _check_positive(clip=clip, max_epsilon=max_epsilon)
        self.clip, self.noise_multiplier, self.delta, self.per_layer = clip, noise_multiplier, delta, per_layer
        self.accountant, self.max_epsilon, self.secure_mode = accountant, max_epsilon, secure_mode
        self._terms = Terms(unit="site", delta=delta, accountant=accountant,
                            adjacency="add or remove one site's updates, seen from beyond the server")

    @property
    def noise_on_updates(self) -> float:
        """Standard deviation over `clip` of the noise on the sum of the updates: larger where bits are noised too.

        Sum and bits are one Gaussian release: z⁻² = z_updates⁻² + (2 × bit_noise)⁻², since a bit of ±1/2 counts half
        (Andrew et al. 2021, theorem 1).
        """
        if not isinstance(self.clip, AdaptiveClip):
            return self.noise_multiplier
        return 1 / math.sqrt(self.noise_multiplier**-2 - (2 * self.clip.bit_noise) ** -2)

    def check_order(self, *, before: Sequence[Privacy], after: Sequence[Privacy]) -> None:
        for other in after:
            changes = type(other).protect is not Privacy.protect or type(other).release is not Privacy.release
            if changes and not other.masks:
                raise ValueError(f"put {other!r} before {type(self).__name__}: what changes updates after they were "
                                 "clipped can make them longer than the noise covers")

    def check_run(self, *, trainer: SiteTrainer, sites: Sequence[Site], strategy: Strategy, rounds: int) -> None:
        if getattr(strategy, "uniform_mean", False) is not True:
            raise ValueError(f"noise at the server is sized for a plain mean in which every update counts the same, "
                             f"which {strategy!r} is not; use FedAvg(weights='uniform'), or LocalGaussian, which "
                             "works with any strategy")
        sample = float(getattr(strategy, "sample", 1.0))
        if self.accountant == "gdp" and sample < 1:
            raise ValueError(f"accountant 'gdp' proves nothing for sites drawn at random (sample {sample:g}); "
                             "say accountant='rdp' or 'prv'")
        _check_start(self._release(sample), self._terms, self.max_epsilon, sites)

    def protect(self, update: Update, memory: Memory, rng: torch.Generator) -> Update:
        clip = self._clip_now(memory)
        clipped = clip_update(update, clip, per_layer=self.per_layer)
        _note(memory, update, clipped)
        bit = {_BIT: 0.5 if update.norm() <= clip else -0.5} if isinstance(self.clip, AdaptiveClip) else {}
        return replace(clipped, weight=1.0, metrics=bit)

    def release(self, mean: Update, cohort: Cohort, memory: Memory, rng: torch.Generator) -> Update:
        if cohort.round > 0 and "ledger" not in memory:
            raise PrivacyError(f"round {cohort.round} begins without the server's ledger, so nobody knows what was "
                               "spent before; go on from a state that holds it, or begin a new run from these weights")
        ledger = Ledger(memory)
        try:
            ledger.charge(self._release(cohort.sample), terms=self._terms, max_epsilon=self.max_epsilon)
        except PrivacyBudgetExhausted as error:
            raise PrivacyBudgetExhausted(f"the server moves the model no more: {error}") from error
        source, expected = None if self.secure_mode else rng, cohort.sites * cohort.sample
        clip = self._clip_now(memory)
        noise = _noise(mean.delta, self.noise_on_updates * clip, source)
        delta = {name: (t.double() * len(cohort) + noise[name]) / expected for name, t in mean.delta.items()}
        if isinstance(self.clip, AdaptiveClip):
            bits = self._sum_of_bits(mean, cohort) + self.clip.bit_noise * float(standard_normal((), source))
            moved = self.clip.moved(clip, 0.5 + bits / expected)
            memory["broadcast"] = {**memory.get("broadcast", {}), _CLIP: torch.tensor(moved, dtype=torch.float64)}
        return replace(mean, delta=delta, metrics={}, spent=ledger.spent())

    def _release(self, sample: float) -> Gaussian:
        return Gaussian(noise_multiplier=self.noise_multiplier, sample_rate=sample)

    def _clip_now(self, memory: Memory) -> float:
        """The clipping norm of this round: the server and its sites read the same one."""
        if not isinstance(self.clip, AdaptiveClip):
            return self.clip
        return float(memory.get("broadcast", {}).get(_CLIP, self.clip.start))

    def _sum_of_bits(self, mean: Update, cohort: Cohort) -> float:
        if len(cohort) == 0:
            return 0.0
        if _BIT not in mean.metrics:
            raise PrivacyError("the bits that an AdaptiveClip follows did not come with the combined update; combine "
                               "with fedlab.strategies.weighted_mean, and change no metrics after CentralGaussian")
        return mean.metrics[_BIT] * len(cohort)


def _noise(like: Tensors, std: float, rng: torch.Generator | None) -> Mapping[str, torch.Tensor]:
    """Gaussian noise, float64, drawn tensor by tensor in their order."""
    return {name: std * standard_normal(t.shape, rng) for name, t in like.items()}


def _note(memory: Memory, before: Update, clipped: Update, noise: Tensors | None = None) -> None:
    """What the technique did, for the site's own eyes."""
    found = {"norm before clipping": before.norm(), "norm after clipping": clipped.norm()}
    if noise is not None:
        found["norm of the noise"] = replace(clipped, delta=noise).norm()
    kept = {name: torch.tensor(value, dtype=torch.float64) for name, value in found.items()}
    memory["diagnostics"] = {**memory.get("diagnostics", {}), **kept}


def _check_positive(*, max_epsilon: float | None = None, **settings: float) -> None:
    if max_epsilon is not None:
        settings["max_epsilon"] = max_epsilon
    for name, value in settings.items():
        if not (isinstance(value, int | float) and 0 < value < math.inf):
            raise ValueError(f"{name} is a positive number, got {value!r}")


def _check_start(release: Gaussian, terms: Terms, max_epsilon: float | None, sites: Sequence[Site]) -> None:
    """What can be known before the first round: δ against the number of sites, one round against the budget."""
    if terms.delta >= 1 / len(sites):
        raise ValueError(f"delta is below 1 over the number of sites (1/{len(sites)}), got {terms.delta}: otherwise "
                         "giving one site away entirely would satisfy the guarantee")
    once = epsilon_of([release], delta=terms.delta, accountant=terms.accountant)
    if max_epsilon is not None and once > max_epsilon:
        raise ValueError(f"the first round alone costs ε = {once:.4g}, more than the budget of {max_epsilon:g}; raise "
                         "noise_multiplier (see noise_multiplier_for) or the budget")
