"""The ε that settings of other frameworks really give: NVIDIA FLARE's filters and Flower's strategies and mods.

Each function takes the settings of one class under the names that it has there, as plain numbers, and says what is
proven about the noise that the class adds: over one round and over all. Neither framework is imported. The proofs are
of the sources of NVFLARE 2.9 (`nvflare.app_common.filters`) and of Flower as of 2025 (`flwr.clientapp.mod`,
`flwr.serverapp.strategy`, and their predecessors `flwr.client.mod` and `flwr.server.strategy`).

For no class here is covered: that a site takes part, its number of patients and of steps, metrics that it returns, and
the last bits of floating point numbers (Mironov 2012); both frameworks draw noise from NumPy's global generator, which
is not cryptographic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from fedlab.core.settings import check_positive, check_share, check_whole, check_within
from fedlab.core.types import Spent, rounded_up
from fedlab.privacy.accounting.ledger import Gaussian, Terms, epsilon_of
from fedlab.privacy.sparse.sparse_vector import ADJACENCY, SparseVectorCost

__all__ = ["Explanation", "explain_flower_adaptive_clipping", "explain_flower_fixed_clipping",
           "explain_flower_local_dp", "explain_nvflare_percentile", "explain_nvflare_svt"]

_SEEN_OUTSIDE = "replace one site's updates, seen from beyond the server"


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What is proven about settings of another framework."""

    settings: str  # as code
    rounds: int
    reasons: Sequence[str]
    per_round: Spent | None = None  # of one round; None where no ε is finite
    statement: Spent | None = None  # of all rounds; None where no ε is finite

    @property
    def epsilon(self) -> float:
        """Of all rounds, at the δ of `statement`; infinite where nothing is proven."""
        return math.inf if self.statement is None else self.statement.epsilon

    def _lines(self) -> list[str]:
        if self.statement is None:
            return ["no finite ε: no guarantee is proven, for any number of rounds"]
        lines = [f"one round: {self.per_round}"]
        return lines if self.rounds == 1 else [*lines, f"{self.rounds} rounds: {self.statement}"]

    def __str__(self) -> str:
        return "\n".join([f"{self.settings}", *self._lines(), *(f"- {reason}" for reason in self.reasons)])

    def __repr__(self) -> str:
        return f"<Explanation of {self.settings}: {'; '.join(self._lines())}>"

    def _repr_html_(self) -> str:
        reasons = "".join(f"<li>{escape(reason)}</li>" for reason in self.reasons)
        return (f"<p><code>{escape(self.settings)}</code><br>{'<br>'.join(map(escape, self._lines()))}</p>"
                f"<ul>{reasons}</ul>")


def explain_nvflare_svt(*, parameters: int, fraction: float = 0.1, epsilon: float = 0.1, noise_var: float = 0.1,
                        gamma: float = 1e-5, tau: float = 1e-6, replace: bool = True,
                        epsilon_threshold: float | None = None, epsilon_query: float | None = None,
                        epsilon_release: float | None = None, scalars: int = 0, clips_before_noise: bool = True,
                        rounds: int = 1, delta: float = 1e-5) -> Explanation:
    """The ε of NVFLARE's `SVTPrivacy`, for any two updates of a site.

    Let N be the number of weights, c = ⌈fraction N⌉ and γ = gamma. The filter draws Laplace noise of scale γ/ε₁ for the
    threshold, 2cγ/ε₂ for each comparison and 2cγ/ε₃ for each value. It compares all weights that are not accepted yet,
    pass by pass, until c or more are accepted, and then draws c of *all* accepted ones.

    *Positions, replace=False.* Draw an order of the weights at random: the c chosen are the first c accepted ones in
    this order. Say the last pass is number p. An outcome (the c positions, p) is a union of disjoint events, each of
    which names when the c positions were accepted, and which of the others were accepted before pass p: at most c - 1,
    or p - 1 passes had sufficed. Each event is a product of at most 2c - 1 successful comparisons and of failed ones.
    Shift the threshold by γ (a factor of e^ε₁ at most): failures become more likely, each success less likely by at
    most e^(2γ ε₂ / 2cγ) = e^(ε₂/c). So positions are ε₁ + ε₂ (2c - 1)/c differentially private. (Algorithm 7 of Lyu, Su
    and Li 2017, arXiv 1603.01699, stops at the success number c and needs ε₁ + ε₂.)

    *Positions, replace=True.* The number of *different* positions depends on how many weights were accepted, so the
    proof above does not hold. The list of all that were accepted, with their passes, has at most N successes: it is
    ε₁ + ε₂ N/c differentially private, and the draw is made from it.

    *Values.* At most c values are sent, each clipped to [-γ, γ] before its noise: ε₃/c each. Without `epsilon_release`
    ε₃ is c × noise_var. All pure mechanisms of all rounds are composed at δ by the "rdp" accountant; gamma and tau
    change nothing, since noise scales with gamma.

    Args:
        parameters: N, numbers in an update, scalars included.
        fraction, epsilon, noise_var, gamma, tau, replace, epsilon_threshold, epsilon_query, epsilon_release: as there.
        scalars: tensors without dimensions in an update, such as the counters of batch norm; the filter sends them as
            they are.
        clips_before_noise: False for earlier releases of NVFLARE, which clip the noisy values only.
        rounds: in which the site takes part.
        delta: of the statement.

    Raises:
        ValueError: a setting is out of range.
    """
    check_positive(fraction=fraction, epsilon=epsilon, gamma=gamma)
    check_positive(optional=True, epsilon_threshold=epsilon_threshold, epsilon_query=epsilon_query,
                   epsilon_release=epsilon_release)
    check_whole(parameters=parameters, rounds=rounds)
    check_whole(least=0, scalars=scalars)
    check_within(tau=tau)
    if epsilon_release is None:
        check_positive(noise_var=noise_var)
    shown = _code("SVTPrivacy", fraction=fraction, epsilon=epsilon, noise_var=noise_var, gamma=gamma, tau=tau,
                  replace=replace, epsilon_threshold=epsilon_threshold, epsilon_query=epsilon_query,
                  epsilon_release=epsilon_release)
    if scalars or not clips_before_noise:
        return Explanation(settings=shown, rounds=rounds, reasons=[
            *["values are clipped after the noise only, so a large one shows through it"] * (not clips_before_noise),
            *[f"{scalars} tensors without dimensions are sent as they are"] * bool(scalars)])

    count = min(math.ceil(parameters * fraction), parameters)
    threshold, query = _budgets(epsilon, epsilon_threshold, epsilon_query, count)
    per_value = noise_var if epsilon_release is None else epsilon_release / count
    successes = parameters if replace else min(2 * count - 1, parameters)
    cost = SparseVectorCost(released=count, selection=threshold + query * successes / count, per_value=per_value,
                            delta=delta)
    terms = Terms(unit="site", delta=delta, adjacency=ADJACENCY)
    return Explanation(
        settings=shown, rounds=rounds, per_round=terms.spent(cost.releases()),
        statement=terms.spent(cost.releases(rounds=rounds)), reasons=[
            f"each of up to {count:,} values is released under ε = {rounded_up(per_value)} of its own (δ = 0); "
            f"the filter's own account is a sum, ε = {threshold + query + count * per_value:.6g} at δ = 0 per round",
            f"the choice of positions costs ε = {rounded_up(cost.selection)} (δ = 0), not {threshold + query:g}: all "
            "that are accepted count, not only those that are sent" + (
                ", and with replace=True the number of different positions tells how many were accepted" if replace
                else ""),
            "not covered: low bits of floating point numbers, the number of steps"])


def explain_nvflare_percentile(*, percentile: float = 10, gamma: float = 0.01, rounds: int = 1) -> Explanation:
    """NVFLARE's `PercentilePrivacy`: no finite ε, for no setting.

    The filter draws no random numbers. An update and one that differs from it in a value that is sent lead to different
    messages with certainty, so that no ε holds at any δ below 1. For gamma ≤ 0 or a percentile outside of 0 to 100 it
    returns nothing, upon which NVFLARE sends the update unchanged.

    Args:
        percentile, gamma: as there.
        rounds: in which the site takes part.

    Raises:
        ValueError: a setting is not a number, or `rounds` is out of range.
    """
    check_whole(rounds=rounds)
    check_within(least=-math.inf, percentile=percentile, gamma=gamma)
    reasons = ["it adds no noise: the values that are sent are exact up to the limit of gamma, and which ones are sent "
               "depends on the patients"]
    if gamma <= 0 or not 0 <= percentile <= 100:
        reasons = ["with these settings the filter does nothing: the update is sent as it is"]
    return Explanation(settings=_code("PercentilePrivacy", percentile=percentile, gamma=gamma), rounds=rounds,
                       reasons=reasons)


def explain_flower_local_dp(*, clipping_norm: float, sensitivity: float, epsilon: float, delta: float,
                            rounds: int = 1) -> Explanation:
    """The ε of Flower's `LocalDpMod`, for any two updates of a site.

    The mod clips the update to the norm C = clipping_norm and adds Gaussian noise of standard deviation σ = sensitivity
    √(2 ln(1.25/δ)) / epsilon to every number. That is the classical formula (Dwork and Roth 2014, theorem A.1), proven
    for epsilon below 1 and for updates that differ by at most `sensitivity`. Two clipped updates differ by up to 2C, so
    a round is a Gaussian mechanism of noise multiplier σ/2C, and R rounds are one of σ/(2C √R) (Dong et al. 2019). Its
    exact ε at δ is that of Balle and Wang 2018, theorem 8: accountant "gdp".

    Args:
        clipping_norm, sensitivity, epsilon, delta: as there.
        rounds: in which the site takes part.

    Raises:
        ValueError: a setting is out of range.
    """
    check_positive(clipping_norm=clipping_norm, epsilon=epsilon)
    check_within(sensitivity=sensitivity)
    check_whole(rounds=rounds)
    terms = Terms(unit="site", delta=delta, adjacency=ADJACENCY, accountant="gdp")
    shown = _code("LocalDpMod", clipping_norm=clipping_norm, sensitivity=sensitivity, epsilon=epsilon, delta=delta)
    if sensitivity == 0:
        return Explanation(settings=shown, rounds=rounds, reasons=["sensitivity=0 means no noise"])
    std = sensitivity * math.sqrt(2 * math.log(1.25 / delta)) / epsilon
    reasons = [f"noise of standard deviation {std:.6g} on an update that any other differs from by up to "
               f"{2 * clipping_norm:g}, twice the clipping norm"]
    if sensitivity != 2 * clipping_norm:
        reasons.append(f"sensitivity={sensitivity:g} is {'less' if sensitivity < 2 * clipping_norm else 'more'} than "
                       f"these {2 * clipping_norm:g}, so the noise is not that of epsilon={epsilon:g}")
    if epsilon >= 1:
        reasons.append("Flower's formula for the noise is proven for epsilon below 1 only")
    reasons += ["Flower keeps no account over rounds",
                "not covered: num_examples and metrics, which leave the site as they are; an update with NaN, which is "
                "not clipped; low bits of floating point numbers"]
    return _gaussian(shown, std / (2 * clipping_norm), terms, rounds, reasons)


def explain_flower_fixed_clipping(*, noise_multiplier: float, clipping_norm: float, num_sampled_clients: int,
                                  largest_share: float = 1.0, client_side: bool = False, rounds: int = 1,
                                  delta: float = 1e-5) -> Explanation:
    """The ε of Flower's `DifferentialPrivacyServerSideFixedClipping` and `…ClientSideFixedClipping` around `FedAvg`.

    The strategy adds Gaussian noise of standard deviation z C / m to the mean of updates clipped to C, with z =
    noise_multiplier and m = num_sampled_clients. The mean is that of `FedAvg`: weighted by num_examples and divided by
    the weight of those who answered. Let w be the largest share of a site in it. A site with share v and update u
    moves the mean M of the others to v u + (1 - v) M. Another update u' with share v' in its place changes the result
    by at most C (v + v' + |v - v'|) ≤ 2 C w. So a round is a Gaussian mechanism of noise multiplier z / (2 m w), which
    is z/2 if all sites count the same. It is composed as in `explain_flower_local_dp`.

    No amplification by sampling is credited: Flower draws a fixed number of sites without replacement.

    Args:
        noise_multiplier, clipping_norm, num_sampled_clients: as there.
        largest_share: w, of one site in the mean of any round: its num_examples over those of all; 1 over
            num_sampled_clients if all count the same, 1 if nothing is known.
        client_side: for `DifferentialPrivacyClientSideFixedClipping`.
        rounds: of the run.
        delta: of the statement.

    Raises:
        ValueError: a setting is out of range.
    """
    check_positive(clipping_norm=clipping_norm)
    _check_central(noise_multiplier, num_sampled_clients, largest_share, rounds)
    terms = Terms(unit="site", delta=delta, adjacency=_SEEN_OUTSIDE, accountant="gdp")
    shown = _code(f"DifferentialPrivacy{'Client' if client_side else 'Server'}SideFixedClipping",
                  noise_multiplier=noise_multiplier, clipping_norm=clipping_norm,
                  num_sampled_clients=num_sampled_clients)
    if noise_multiplier == 0:
        return Explanation(settings=shown, rounds=rounds, reasons=["noise_multiplier=0 means no noise"])
    return _gaussian(shown, noise_multiplier / (2 * num_sampled_clients * largest_share), terms, rounds,
                     _central_reasons(num_sampled_clients, largest_share, client_side=client_side))


def explain_flower_adaptive_clipping(*, noise_multiplier: float, num_sampled_clients: int,
                                     initial_clipping_norm: float = 0.1, target_clipped_quantile: float = 0.5,
                                     clip_norm_lr: float = 0.2, clipped_count_stddev: float | None = None,
                                     largest_share: float = 1.0, client_side: bool = False, rounds: int = 1,
                                     delta: float = 1e-5) -> Explanation:
    """The ε of Flower's `DifferentialPrivacyServerSideAdaptiveClipping` and `…ClientSideAdaptiveClipping`.

    Let m, w as in `explain_flower_fixed_clipping`, s = clipped_count_stddev (m/20 unless given), η = clip_norm_lr and
    C the clipping norm of a round. The strategy counts the updates that were clipped and adds noise of standard
    deviation s: replacing a site changes the count by 1, so this is a Gaussian mechanism of noise multiplier s. The
    next norm is C' = C exp(-η (b - q)), with b the noisy count over m and q = target_clipped_quantile. Updates are
    clipped to C, but their mean gets noise of standard deviation z' C'/m with z' = (z⁻² - (2s)⁻²)^(-1/2) (Andrew et al.
    2021, theorem 1, where C stands for C'): noise multiplier z' C'/(2 m w C), which b decides.

    Let B = 1 + s Φ⁻¹(1 - δ/2R) / m. Since at most m updates are clipped, b exceeds B in any of R rounds with
    probability at most δ/2. While it does not, C'/C ≥ r = exp(-η (B - q)), and each round is the adaptive composition
    of Gaussian mechanisms of noise multipliers s and at least z' r/(2 m w). The event is one of outputs, so the rounds
    are (ε, δ/2 + δ/2) differentially private with the ε of that composition at δ/2 (Dong et al. 2019, corollary 3.3;
    accountant "gdp").

    The count is of clipped updates where Andrew et al. count the others: the norm shrinks if many updates are clipped.

    Args:
        noise_multiplier, num_sampled_clients, initial_clipping_norm, target_clipped_quantile, clip_norm_lr,
            clipped_count_stddev: as there.
        largest_share, rounds, delta: as in `explain_flower_fixed_clipping`.
        client_side: for `DifferentialPrivacyClientSideAdaptiveClipping`.

    Raises:
        ValueError: a setting is out of range, or one that Flower refuses: a noise_multiplier of
            2 × clipped_count_stddev or more.
    """
    from scipy.stats import norm

    check_positive(initial_clipping_norm=initial_clipping_norm, clip_norm_lr=clip_norm_lr)
    check_within(most=1, target_clipped_quantile=target_clipped_quantile)
    _check_central(noise_multiplier, num_sampled_clients, largest_share, rounds)
    terms = Terms(unit="site", delta=delta, adjacency=_SEEN_OUTSIDE, accountant="gdp")
    shown = _code(f"DifferentialPrivacy{'Client' if client_side else 'Server'}SideAdaptiveClipping",
                  noise_multiplier=noise_multiplier, num_sampled_clients=num_sampled_clients,
                  initial_clipping_norm=initial_clipping_norm, target_clipped_quantile=target_clipped_quantile,
                  clip_norm_lr=clip_norm_lr, clipped_count_stddev=clipped_count_stddev)
    count_std = num_sampled_clients / 20 if clipped_count_stddev is None else clipped_count_stddev
    check_within(clipped_count_stddev=count_std)
    if noise_multiplier == 0:
        return Explanation(settings=shown, rounds=rounds, reasons=["noise_multiplier=0 means no noise"])
    if noise_multiplier >= 2 * count_std:
        raise ValueError(f"noise_multiplier is below 2 × clipped_count_stddev ({2 * count_std:g}) in Flower, got "
                         f"{noise_multiplier:g}; more noise on the count leaves less to the updates")
    updates = (noise_multiplier**-2 - (2 * count_std)**-2)**-0.5 / (2 * num_sampled_clients * largest_share)

    def least_ratio(rounds: int) -> float:
        most = 1 + count_std * float(norm.isf(delta / 2 / rounds)) / num_sampled_clients
        return math.exp(-clip_norm_lr * (most - target_clipped_quantile))

    def spent(rounds: int) -> Spent:
        both = [Gaussian(noise_multiplier=count_std, steps=rounds),
                Gaussian(noise_multiplier=updates * least_ratio(rounds), steps=rounds)]
        return Spent(epsilon_of(both, delta=delta / 2, accountant="gdp"), *terms.spent(both)[1:])

    reasons = ["the noise has the size of the next round's clipping norm, which may be "
               f"{least_ratio(rounds):.3g} of the one that updates were clipped to; δ/2 covers a smaller one",
               *_central_reasons(num_sampled_clients, largest_share, client_side=client_side)]
    return Explanation(settings=shown, rounds=rounds, per_round=spent(1), statement=spent(rounds), reasons=reasons)


def _budgets(epsilon: float, threshold: float | None, query: float | None, count: int) -> tuple[float, float]:
    """ε₁ and ε₂ of NVFLARE's filter: they sum to epsilon, as 1 : (2c)^(2/3) unless given."""
    if threshold is None:
        threshold = epsilon / (1 + (2 * count) ** (2 / 3)) if query is None else epsilon - query
    query = epsilon - threshold if query is None else query
    if min(threshold, query) <= 0 or not math.isclose(threshold + query, epsilon, rel_tol=1e-5):
        raise ValueError(f"epsilon_threshold and epsilon_query are positive and sum to epsilon ({epsilon:g}), got "
                         f"{threshold:g} and {query:g}")
    return threshold, query


def _check_central(noise_multiplier: float, num_sampled_clients: int, largest_share: float, rounds: int) -> None:
    check_within(noise_multiplier=noise_multiplier)
    check_whole(num_sampled_clients=num_sampled_clients, rounds=rounds)
    check_share(largest_share=largest_share)
    if largest_share * num_sampled_clients < 1 - 1e-9:
        raise ValueError(f"of {num_sampled_clients} sites the largest has a share of at least "
                         f"{1 / num_sampled_clients:g}, got largest_share={largest_share:g}")


def _central_reasons(sites: int, share: float, *, client_side: bool) -> list[str]:
    unequal = share * sites > 1 + 1e-9
    return [
        f"one site moves the mean by up to {2 * share:.3g} clipping norms: twice its share of {share:.3g}"
        + (f" (FedAvg weighs by num_examples; with equal weights it were {2 / sites:.3g})" if unequal else "")
        + f", and the noise is scaled to {1 / sites:.3g}",
        "Flower keeps no account over rounds; it draws a fixed number of sites without replacement, which is credited "
        "with no amplification",
        "holds for FedAvg, whose result is a mean, and if all sites that were drawn answer; momentum or an optimiser "
        "at the server keeps means without noise",
        *["the sites are trusted to clip: the server does not see whether the mod is installed"] * client_side,
        "not covered: the server, which sees each update; evaluation on patients of a site; an update with NaN, which "
        "is not clipped; low bits of floating point numbers"]


def _gaussian(settings: str, noise_multiplier: float, terms: Terms, rounds: int, reasons: list[str]) -> Explanation:
    once, all_rounds = (terms.spent([Gaussian(noise_multiplier=noise_multiplier, steps=n)]) for n in (1, rounds))
    return Explanation(settings=settings, rounds=rounds, per_round=once, statement=all_rounds, reasons=reasons)


def _code(name: str, **settings: object) -> str:
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in settings.items() if value is not None)})"
