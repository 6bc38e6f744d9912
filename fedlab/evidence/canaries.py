"""Canaries: what ε a technique shows in one run, beside the ε that it claims.

The technique works as in a run, at a site (`SiteTask`) or at the server (`each_round`), on a small linear network.
Canaries are in or out by independent fair coins, and are the easiest to see that its clipping allows:

- per patient: patients whose gradients are Dirac, one large coordinate each (M. Nasr et al., Tight Auditing of
  Differentially Private Machine Learning, USENIX Security 2023, arXiv 2302.07956), in all tensors of the network;
- per site, against the server: sites with a long update along a random direction or against it (G. Andrew et al.,
  One-shot Empirical Privacy Estimation for Federated Learning, 2023, arXiv 2302.03098);
- per site, with noise at the server: sites with Dirac updates, seen in the released model.

From the guesses about them follows a lower bound (`fedlab.evidence.audits`). A bound above the claim refutes it; one
below proves nothing, and is far below where records are sampled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fedlab.checks.rehearsal import Stage
from fedlab.checks.small_runs import small_trainer
from fedlab.checks.watched import ScriptedTrainer
from fedlab.core.seeds import derive
from fedlab.core.settings import check_choice, check_positive, check_whole, check_within
from fedlab.core.types import Patient, ServerState, Site, SiteState, Spent, Tensors
from fedlab.evidence.audits import (
    alone_refuted,
    best_accuracy,
    epsilon_in_one_run,
    guesses_alone,
    louder,
    make_guesses,
    refuted,
    trade_off,
)
from fedlab.evidence.findings import Finding, Threat
from fedlab.evidence.intervals import Floats
from fedlab.privacy.accounting.ledger import Ledger
from fedlab.privacy.accounting.mechanisms import Release, epsilon_of
from fedlab.privacy.aggregation import Aggregation
from fedlab.privacy.base import Privacy
from fedlab.run.federate import each_round
from fedlab.run.history import draws_noise
from fedlab.run.site_task import SiteTask
from fedlab.strategies.averaging import FedAvg
from fedlab.training.trainer import SiteTrainer

__all__ = ["Audit", "CanaryAudit"]

Place = Literal["patient", "site", "server"]

#: Length of a canary's gradient or update, far above any clipping norm.
_LONG = 1e4
#: Entries of an update, where one direction serves all sites.
_ENTRIES = 256
#: Steps of the search for the noise that is ruled out: a factor, and its powers at least and at most.
_FACTOR, _LEAST, _MOST = 1.04, -160, 160
_THREATS: Mapping[Place, Threat] = {
    "patient": Threat(who="server", sees="the updates of a site, and knows all of its patients but one",
                      wants="whether that patient took part"),
    "site": Threat(who="server", sees="the update of a site", wants="which of two updates the site had"),
    "server": Threat(who="recipient of the model", sees="the model after each round, and knows all sites but one",
                     wants="whether that site took part")}


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What canaries show about a technique.

    Attributes:
        finding: the lower bound of ε at the δ of the claim; its value is the bound at even odds.
        claimed: what the ledger states as spent in the same run; None for a technique without a formal guarantee.
        noise: the noise that the guesses allow at most, over the one that is charged; infinite if they rule out none,
            NaN without a claim.
        most: the lower bound if every guess were right: no audit with so many canaries shows more.
        any_mechanism: the lower bound that needs no trust in the kind of the noise (Steinke et al. 2023).
    """

    finding: Finding
    claimed: Spent | None
    noise: float
    most: float
    any_mechanism: float

    @property
    def findings(self) -> tuple[Finding, ...]:
        """The lower bound alone."""
        return (self.finding,)

    @property
    def refuted(self) -> bool:
        """Whether the claim is wrong, with 95 % confidence."""
        return self.noise < 1

    @property
    def verdict(self) -> str:
        """The claim beside the bound, in words."""
        if self.claimed is None:
            return "no ε is claimed"
        if self.refuted:
            return f"REFUTED: the noise is at most {self.noise:.2f} times the charged one. Claimed: {self.claimed}"
        limit = (f"; {self.finding.trials} canaries show at most ε = {self.most:.2f}"
                 if self.most < self.claimed.epsilon else "")
        return f"in agreement with the claim, which is no proof of it{limit}. Claimed: {self.claimed}"

    def __str__(self) -> str:
        return f"{self.finding}\n{self.verdict}"

    def _repr_html_(self) -> str:
        return f"{self.finding._repr_html_()}<p>{escape(self.verdict)}</p>"


@dataclass(frozen=True, kw_only=True)
class CanaryAudit:
    """An audit of a technique in one run, with a lower bound of ε at 95 % confidence.

    A claim is tested as what the ledger says: its releases with less and less noise, until their trade-off function no
    longer rules out the guesses (Mahloujifar et al. 2024). Without a claim the bound is that for any mechanism. Sites
    that protect themselves have a run each, so their guesses are independent; patients of a site share one.

    Args:
        canaries: their number; fewer where δ demands it.
        patients: of a site, by which the `batch` of a technique becomes a rate.
        rounds: after which the attacker looks.
        steps: of training per round; for techniques that work in training.
        delta: at which ε is stated where a technique claims none.
        seed: of coins, directions and noise.

    Raises:
        ValueError: a setting is out of range.
    """

    canaries: int = 1000
    patients: int = 20
    rounds: int = 1
    steps: int = 1
    delta: float = 1e-5
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole(least=10, canaries=self.canaries)
        check_whole(patients=self.patients, rounds=self.rounds, steps=self.steps)
        check_positive(delta=self.delta)
        check_within(below=1, delta=self.delta)

    def __call__(self, technique: Privacy, *, unit: Literal["patient", "site"] | None = None) -> Audit:
        """Audits a technique, or several joined by `+`; budgets are left out.

        Args:
            technique: does not change.
            unit: whose guarantee is audited, where it gives one to both; that per patient by default.

        Raises:
            ValueError: it gives no guarantee for the unit, or is an aggregation.
        """
        if not isinstance(technique, Privacy):
            raise ValueError(f"canaries audit a privacy technique, got {technique!r}; of an aggregation audit what "
                             "`check_privacy` watches")
        place = _place(technique, unit)
        count = self._count(technique, place)
        settings = self._settings(technique, count)
        present = np.random.default_rng(derive(self.seed, "coins")).random(count) < 0.5
        run = {"patient": self._patients, "site": self._sites, "server": self._server}[place]
        scores, releases, claimed = run(settings, present)
        return self._audit(technique, place, scores, present, releases, claimed)

    def _count(self, technique: Privacy, place: Place) -> int:
        """A guarantee for one of so many units needs δ below 1 over their number."""
        deltas = [getattr(layer, "delta", None) for layer in technique.layers]
        largest = max((d for d in deltas if isinstance(d, float)), default=0.0) if place != "site" else 0.0
        return self.canaries if largest * self.canaries < 1 else math.ceil(1 / largest) - 1

    def _settings(self, technique: Privacy, count: int) -> Privacy:
        """The technique without budgets, with batches at the rate of a site of so many patients."""
        def changed(part: Any) -> dict[str, Any]:
            batch = getattr(part, "batch", None)
            return ({"max_epsilon": None} if getattr(part, "max_epsilon", None) else {}) | (
                {"batch": batch * count / self.patients} if isinstance(batch, int | float) else {})

        stage = Stage(technique=technique, trainer=small_trainer(steps=1), sites=[], aggregation=Aggregation(),
                      strategy=FedAvg(weights="uniform"))
        return stage.remade(changed).technique

    def _patients(self, technique: Privacy, present: npt.NDArray[np.bool_]) -> _Seen:
        edge = math.ceil((len(present) / 4)**(1 / 3))
        people = []
        for k, there in enumerate(present):
            image = torch.zeros(4, edge, edge, edge)
            image.view(-1)[k] = float(there)
            people.append(Patient(f"canary-{k}", image, torch.zeros(edge, edge, edge, dtype=torch.uint8), np.eye(4)))
        trainer = small_trainer(model=_Linear(len(present)), loss=_Sum(), lr=1.0, steps=self.steps,
                                crop=(edge, edge, edge))
        site, state, kept = Site("canaries", people), _start(trainer), SiteState(enrolled=True)
        task, scores = SiteTask(trainer=trainer, privacy=technique, seed=self.seed), np.zeros(len(present))
        for number in range(self.rounds):
            scores -= _flat(task(site, ServerState(round=number, params=state.params), kept).delta)
        ledger = Ledger(kept)
        return scores, ledger.releases("patient"), _claimed(ledger.spent(), "patient")

    def _sites(self, technique: Privacy, present: npt.NDArray[np.bool_]) -> _Seen:
        signs = np.random.default_rng(derive(self.seed, "direction")).choice([-1.0, 1.0], _ENTRIES)
        plain = small_trainer(model=_Linear(_ENTRIES), loss=_Sum(), steps=1)
        person, state = Patient("p", torch.zeros(4, 8, 8, 8), torch.zeros(8, 8, 8, dtype=torch.uint8),
                                np.eye(4)), _start(plain)
        along, kept = _shaped(_LONG * signs / math.sqrt(_ENTRIES), state.params), SiteState()
        against = {name: -t for name, t in along.items()}

        def score(name: str, sent: Tensors) -> float:
            nonlocal kept
            trainer: Any = ScriptedTrainer(plain, lambda site, number: sent)
            task, kept, total = SiteTask(trainer=trainer, privacy=technique, seed=self.seed), SiteState(
                enrolled=True), 0.0
            for number in range(self.rounds):
                moved = task(Site(name, [person]), ServerState(round=number, params=state.params), kept).delta
                total += float(_flat(moved) @ signs)
            return total

        score("probe", along)
        claimed = _claimed(Ledger(kept).spent(), "site")
        if claimed is not None and "any two" not in claimed.adjacency and "replace one" not in claimed.adjacency:
            against = {name: torch.zeros_like(t) for name, t in along.items()}
        scores = np.array([score(f"site-{k}", along if there else against) for k, there in enumerate(present)])
        return scores, Ledger(kept).releases("site"), claimed

    def _server(self, technique: Privacy, present: npt.NDArray[np.bool_]) -> _Seen:
        plain = small_trainer(model=_Linear(len(present)), loss=_Sum(), steps=1)
        person, start = Patient("p", torch.zeros(4, 8, 8, 8), torch.zeros(8, 8, 8, dtype=torch.uint8),
                                np.eye(4)), _start(plain)
        names = [f"site-{k}" for k in range(len(present))]
        place = {name: k for k, name in enumerate(names)}

        def script(site: str, number: int) -> Tensors:
            entries = np.zeros(len(present))
            entries[place[site]] = _LONG * present[place[site]]
            return _shaped(entries, start.params)

        trainer: Any = ScriptedTrainer(plain, script)
        *_, last = each_round(trainer, [Site(name, [person]) for name in names], strategy=FedAvg(weights="uniform"),
                              privacy=technique, rounds=self.rounds, seed=self.seed)
        ledger = Ledger(last.state)
        return (_flat(last.state.params) - _flat(start.params), ledger.releases("site"),
                _claimed(ledger.spent(), "site"))

    def _audit(self, technique: Privacy, place: Place, scores: Floats, present: npt.NDArray[np.bool_],
               releases: Sequence[Release], claimed: Spent | None) -> Audit:
        delta = self.delta if claimed is None else claimed.delta
        found, perfect = (_Bounds(place == "site", given, present, delta) for given in (scores, present.astype(float)))
        low, value, most = (bounds.epsilon(releases, claimed, level) for bounds, level in (
            (found, 0.05), (found, 0.5), (perfect, 0.05)))
        factor = found.factor(releases, 0.05) if claimed is not None else math.nan
        finding = Finding(attack=f"{self!r}({technique!r})", threat=_THREATS[place], measure="ε shown by canaries",
                          value=max(low, value), low=low, high=math.inf, trials=len(present), chance=0.0)
        return Audit(finding=finding, claimed=claimed, noise=math.inf if factor == 0 else 1 / factor, most=most,
                     any_mechanism=found.of_any(0.05))


class _Bounds:
    """Lower bounds from one set of scores, of canaries that share a run or that have each their own."""

    def __init__(self, alone: bool, scores: Floats, present: npt.NDArray[np.bool_], delta: float) -> None:
        self.alone, self.canaries, self.delta = alone, len(present), delta
        self.guesses = [guesses_alone(scores, present)] if alone else make_guesses(scores, present)

    def epsilon(self, releases: Sequence[Release], claimed: Spent | None, level: float) -> float:
        """The lower bound: by the releases of the ledger, or where nothing is claimed for any mechanism."""
        if claimed is None:
            return self.of_any(level)
        factor = self.factor(releases, level)
        return 0.0 if factor == 0 else epsilon_of(louder(releases, factor), delta=claimed.delta,
                                                  accountant=claimed.accountant)  # type: ignore[arg-type]

    def factor(self, releases: Sequence[Release], level: float) -> float:
        """The largest factor by which the charged noise may be divided so that the guesses refute it; 0 if none."""
        def wrong(power: int) -> bool:
            least = trade_off(louder(releases, _FACTOR**power))
            if self.alone:
                return alone_refuted(best_accuracy(least), self.guesses[0], level=level)
            return any(refuted(least, one, canaries=self.canaries, level=level / len(self.guesses))
                       for one in self.guesses)

        power = _largest(wrong, _LEAST, _MOST)
        return 0.0 if power is None else _FACTOR**power

    def of_any(self, level: float) -> float:
        """The lower bound for any mechanism."""
        if not self.alone:
            return max(epsilon_in_one_run(one, canaries=self.canaries, delta=self.delta,
                                          level=level / len(self.guesses)) for one in self.guesses)

        def wrong(thousandths: int) -> bool:  # Kairouz et al. 2015: the best accuracy under ε and δ
            odds = math.exp(thousandths / 1000)
            return alone_refuted((odds + self.delta) / (1 + odds), self.guesses[0], level=level)

        return (_largest(wrong, 0, 30_000) or 0) / 1000


def _largest(wrong: Callable[[int], bool], low: int, high: int) -> int | None:
    """The largest number that is wrong, of which all smaller ones are too; None if the first one is not."""
    if not wrong(low):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if wrong(middle) else (low, middle)
    return low


#: Scores of the canaries, the releases in the ledger and what it states as spent.
_Seen = tuple[Floats, list[Release], Spent | None]


class _Linear(nn.Module):
    """Logits that are the sum of an image's first entries, each times a weight: three tensors of weights."""

    def __init__(self, entries: int) -> None:
        super().__init__()
        sizes = [entries - 2 * (entries // 3), entries // 3, entries // 3]
        self.first, self.middle, self.last = (nn.Linear(size, 1, bias=False) for size in sizes)
        for layer in (self.first, self.middle, self.last):
            nn.init.zeros_(layer.weight)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        sizes = [layer.in_features for layer in (self.first, self.middle, self.last)]
        flat = image.flatten(1)
        flat = nn.functional.pad(flat, (0, max(0, sum(sizes) - flat.shape[1])))[:, :sum(sizes)]
        one, two, three = flat.split(sizes, dim=1)
        value = self.first(one) + self.middle(two) + self.last(three)
        logits: torch.Tensor = value.view(-1, 1, 1, 1, 1).expand(-1, 3, *image.shape[2:])
        return logits


@dataclass(frozen=True)
class _Sum:
    """A loss that is the mean of the logits times a large number: the gradient of a patient is its image, enlarged."""

    def __call__(self, logits: Any, target: torch.Tensor) -> torch.Tensor:
        return _LONG * logits.float().mean()  # type: ignore[no-any-return]


def _place(technique: Privacy, unit: Literal["patient", "site"] | None) -> Place:
    """Where the guarantee is given: in training, at the site, or at the server; at the site without one."""
    if unit is not None:
        check_choice(("patient", "site"), unit=unit)
    server = any(layer.works_at_server and draws_noise(layer) for layer in technique.layers)
    units = technique.units | ({"site"} if server else set())
    if unit is not None and unit not in units:
        raise ValueError(f"{technique!r} gives no guarantee per {unit}, so there is none to audit; it gives one per "
                         f"{' and per '.join(sorted(units)) or 'nothing'}")
    if "patient" in units and unit != "site":
        return "patient"
    return "server" if server and "site" not in technique.units else "site"


def _claimed(spent: Sequence[Spent], unit: str) -> Spent | None:
    return next((one for one in spent if one.unit == unit), None)


def _start(trainer: SiteTrainer) -> ServerState:
    return ServerState(round=0, params=trainer.initial())


def _flat(tensors: Tensors) -> Floats:
    flat: Floats = torch.cat([t.detach().double().flatten() for t in tensors.values()]).numpy()
    return flat


def _shaped(entries: Floats, like: Tensors) -> dict[str, torch.Tensor]:
    parts = torch.from_numpy(entries).float().split([t.numel() for t in like.values()])
    return {name: part.view(t.shape) for part, (name, t) in zip(parts, like.items(), strict=True)}
