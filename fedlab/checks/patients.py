"""Guarantees per patient through training, such as DP-SGD: noise of steps, influence of a patient, who is drawn.

One patient is replaced by extreme ones while all else stays, the random numbers included, and the gradients of every
step are compared just before the optimiser takes them. The noise itself is seen with a loss so small that gradients
vanish beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedlab.checks.check_report import Finding
from fedlab.checks.claims import PRIVACY, Claim, allowed_of, chi_of
from fedlab.checks.leaks import differing, moved_far, statistics
from fedlab.checks.noise_law import (
    least_distance,
    least_joint_distance,
    odd_draws,
    spread_of_norms,
)
from fedlab.checks.noise_tests import Noise, law_of
from fedlab.checks.rehearsal import Stage, marked, other_patient, rehearse
from fedlab.checks.samples import Samples, Sketch, collect
from fedlab.checks.small_runs import plain_descent
from fedlab.checks.watched import Rehearsal
from fedlab.core.types import Patient, Site, Tensors
from fedlab.core.weights import load_weights
from fedlab.privacy.accounting.mechanisms import Gaussian
from fedlab.privacy.dp.clipping import AdaptiveClip

__all__ = ["check_patients"]

Floats = npt.NDArray[np.float64]

#: Runs in which noise is seen, in which final updates are compared, and in which patients are counted.
_RUNS, _FINAL_RUNS, _COUNTED = 12, 10, 6
#: Steps and rounds in which noise is seen; steps of each of three rounds in which patients are counted.
_STEPS, _ROUNDS, _COUNTED_STEPS = 2, 2, 16
#: Seeds that are tried until the patient is drawn, and draws that are looked at.
_TRIED, _DRAWN = 40, 2
#: Spread of squared norms of steps, over that of Gaussian noise of one size; later steps' noise over that of the first.
_UNEVEN, _LATER = 3.0, 0.02
_SLACK = 0.005
#: Patients, if the batch allows so few: of which a step draws several, and of which it may draw none.
_MANY, _FEW = 6, 3


def _with(patient: Patient, *, scale: float = 1.0, label: int | None = None) -> Patient:
    drawn = patient.label if label is None or patient.label is None else torch.full_like(patient.label, label)
    return Patient(patient.id, patient.image * scale, drawn, patient.affine)


#: Changes of a patient; any result may take the place of any other.
_PATIENTS: Mapping[str, Callable[[Patient], Patient]] = {
    "a patient": lambda patient: patient,
    "a scan 10 000 times as bright": lambda patient: _with(patient, scale=1e4),
    "an empty scan": lambda patient: _with(patient, scale=0.0),
    "a scan that is all tumour": lambda patient: _with(patient, label=4),
    "a scan without tumour": lambda patient: _with(patient, label=0),
    "a dark scan": lambda patient: _with(patient, scale=0.05),
    "a bright scan that is all tumour": lambda patient: _with(patient, scale=30, label=4),
    "a bright scan without tumour": lambda patient: _with(patient, scale=30, label=0),
}


@dataclass(frozen=True)
class _Vanishing:
    """A loss whose gradients vanish beside any noise."""

    def __call__(self, logits: Any, target: torch.Tensor) -> torch.Tensor:
        outputs = logits if isinstance(logits, list | tuple) else [logits]
        return 1e-20 * sum(one.float().square().mean() for one in outputs)  # type: ignore[no-any-return]


def check_patients(stage: Stage, claim: Claim) -> Iterator[Finding]:
    """Noise, sensitivity, steps and draws of a claim about patients, and what finally leaves."""
    load_weights(stage.trainer.model, stage.like)  # the start of the trainer that is made from it
    trainer = replace(stage.trainer, optimiser=plain_descent, lr=1e-3, steps=_STEPS, epochs=None, augment=None,
                      momentum="restart")
    stage = replace(stage.unlimited().alone(), trainer=trainer)
    good = True
    for check, used in ((_noise_and_sensitivity, _with_few(stage, _MANY)), (_draws, stage),
                        (_leaving, _with_few(stage, _FEW))):
        for finding in check(used, claim):
            good &= finding.outcome != "failed"
            yield finding
        if not good:
            return


def _noise_and_sensitivity(stage: Stage, claim: Claim) -> Iterator[Finding]:
    sketch, where = Sketch.of(stage.like), stage.name(claim.layer)
    quiet = _quiet(stage, sketch)
    taken, charged = quiet.steps, quiet.charged(claim)  # the claim itself is of a run with other numbers of steps
    if taken > charged:
        yield PRIVACY.verdict("charges", f"{where} charges {charged} steps of a round that takes {taken}")
        return
    runs = quiet.rows[:, 0]
    silent = [name for name, group in sketch.groups.items()
              if not (np.ptp(runs[:, group], axis=0) > 0).all()] if runs.any() else []
    yield PRIVACY.verdict("noise", f"training charges the ledger, but the gradient of {silent[0]} does not vary with "
                          "the random numbers" if silent else None, where="training",
                          entries="the gradient of every trainable tensor, in every step")
    if silent:
        return
    found = _influence(stage, claim, sketch, quiet)
    if isinstance(found, Finding):
        yield found
        return
    # To replace a patient is to remove one and to add another: twice the change that is charged.
    sides, worst, what = (2 if claim.removes else 1), 0.0, ("", "")
    for number, (moved, which) in enumerate(found):
        far = math.sqrt(quiet.noise(number, sketch).least_square_distance(moved**2, equal=False)) / sides
        worst, what = max((worst, what), (far / quiet.mu(claim, number), which))
    mu = quiet.mu(claim, 0)
    measured = "no noise at all" if math.isinf(worst) else f"a noise multiplier of {1 / max(worst * mu, 1e-99):.3g}"
    where = f"{where}, {what[0]} and {what[1]}"
    yield PRIVACY.verdict("sensitivity", f"{where}: measured is {measured}, charged is {1 / mu:.3g}{claim.read}"
                          if worst > 1 + _SLACK else None, where=where, measured=measured, charged=f"{1 / mu:.3g}")
    if worst <= 1 + _SLACK:
        yield from _every_step(stage, claim, sketch, quiet, [moved / sides for moved, _ in found])


@dataclass(frozen=True)
class _Quiet:
    """The noise of steps, (runs, steps of all rounds, entries), and the last run."""

    rows: Floats
    seen: Rehearsal
    steps: int  # of a round

    def charged(self, claim: Claim, number: int = 0) -> int:
        """The steps that are charged of a round."""
        return sum(release.steps for release in self._releases(claim, number))

    def mu(self, claim: Claim, number: int) -> float:
        """1 over the noise multiplier that is charged of a step of a round."""
        square = sum(release.steps / release.noise_multiplier**2 for release in self._releases(claim, number))
        return math.sqrt(square / max(1, self.charged(claim, number)))

    def noise(self, number: int, sketch: Sketch) -> Noise:
        """The noise of the first step of a round."""
        return Noise.of(self.rows[:, min(number * self.steps, self.rows.shape[1] - 1)], sketch)

    def _releases(self, claim: Claim, number: int) -> list[Gaussian]:
        return [release for release, _ in self.seen.equipped.get((number, claim.layer), ())
                if isinstance(release, Gaussian)]


def _gradients(seen: Rehearsal, stage: Stage, number: int) -> list[Tensors]:
    """The noisy gradients of the steps of a round; of an optimiser that does not show them, the change it made."""
    site, names = stage.sites[0].name, list(stage.like)
    steps = seen.gradients.get((number, site), [])
    if not steps:
        return [{name: t / 1e-3 for name, t in seen.trained[number][site].items()}]
    return [dict(zip(names, step, strict=True)) for step in steps]


def _quiet(stage: Stage, sketch: Sketch) -> _Quiet:
    """The noise of every step, seen with a vanishing loss; with the usual one if the technique refuses that."""
    still = replace(stage, trainer=replace(stage.trainer, loss=_Vanishing()))
    if rehearse(still, catch=True, quick=True).error is not None:
        still = stage
    rows = []
    for seed in range(_RUNS):
        seen = rehearse(still, seed=seed, rounds=_ROUNDS, quick=True)
        rows.append([sketch.take(step) for number in range(_ROUNDS) for step in _gradients(seen, stage, number)])
    least = min(map(len, rows))
    return _Quiet(np.array([row[:least] for row in rows]), seen, len(_gradients(seen, stage, 0)))


def _influence(stage: Stage, claim: Claim, sketch: Sketch, quiet: _Quiet
               ) -> list[tuple[Floats, tuple[str, str]]] | Finding:
    """The largest shift of a step's gradient in each round when a patient is replaced, and by which.

    Of a guarantee per site, when all its patients are. A finding if none was ever drawn, or steps depend on patients.
    """
    (usual, *others), site = stage.sites[0].train, stage.sites[0].name
    per_site = claim.charges[0].terms.unit == "site"
    rounds = 1 if _adaptive(stage) else _ROUNDS  # noise and bound move: only first steps can be compared

    def steps(name: str, seed: int) -> list[Floats]:
        change = _PATIENTS[name]
        changed = replace(stage, sites=[Site(site, [change(usual), *(map(change, others) if per_site else others)])])
        seen = rehearse(changed, seed=seed, rounds=rounds, quick=True)
        return [np.array([sketch.take(step) for step in _gradients(seen, stage, number)]) for number in range(rounds)]

    stage = stage.seeded()
    noise = [quiet.noise(number, sketch) for number in range(rounds)]
    worst: list[tuple[float, Floats | None, tuple[str, str]]] = [(0.0, None, ("", ""))] * rounds
    drawn = 0
    for seed in range(_TRIED):
        shown = {name: steps(name, seed) for name in list(_PATIENTS)[:2]}
        if all(map(np.array_equal, *shown.values())):
            continue
        shown |= {name: steps(name, seed) for name in list(_PATIENTS)[2:]}
        drawn += 1
        for (a, one), (b, other) in combinations(shown.items(), 2):
            for number in range(rounds):
                if len(one[number]) != len(other[number]):
                    return PRIVACY.verdict("beside the update", f"the number of steps of a round is {len(one[number])} "
                                           f"with {a} and {len(other[number])} with {b}")
                for shift in (one[number] - other[number])[:1 if _adaptive(stage) else None]:
                    found = noise[number].square_distance(shift**2, equal=False)
                    if found > worst[number][0]:
                        worst[number] = found, shift, (a, b)
        if drawn >= _DRAWN and all(shift is not None for _, shift, _ in worst):
            break
    moved = [(shift, which) for _, shift, which in worst if shift is not None]
    return moved if len(moved) == rounds else Finding(check="sensitivity", outcome="warned",
                            what="no replacement of the patient had an effect: it was never drawn",
                            remedy="check the technique with a higher sampling rate and all else the same")


def _adaptive(stage: Stage) -> bool:
    """Whether noise and bound move from step to step, so that only first steps can be compared."""
    return any(isinstance(getattr(layer, "clip", None), AdaptiveClip) for layer in stage.technique.layers)


def _every_step(stage: Stage, claim: Claim, sketch: Sketch, quiet: _Quiet, moved: Sequence[Floats]
                ) -> Iterator[Finding]:
    """Noise of one law in every step, as much as is charged, drawn anew, also in steps that draw few patients or none.

    Args:
        moved: the largest shift of a step, in each round.
    """
    where, rows, adaptive = stage.name(claim.layer), quiet.rows, _adaptive(stage)
    rounds = [0 if adaptive else min(step // quiet.steps, len(moved) - 1) for step in range(rows.shape[1])]
    shifts = np.array([moved[number] for number in rounds])
    charged = np.array([quiet.mu(claim, number)**2 for number in rounds])
    sizes = np.array([Noise.of(rows[:, step], sketch).total for step in range(rows.shape[1])])
    sizes = sizes if adaptive else sizes / (shifts**2).sum(axis=1) * charged
    weak = [step for step, size in enumerate(sizes) if size < _LATER * sizes[0]]
    if weak:
        yield PRIVACY.verdict("independent draws", f"{where} adds next to no noise in step {weak[0] % quiet.steps + 1}")
        return
    noise, turns = rows - rows.mean(axis=0), np.resize([1.0, -1.0], rows.shape[1])
    for sides in [] if adaptive else [np.ones(rows.shape[1]), turns]:
        parts = []
        for group in sketch.groups.values():
            if shifts[:, group].any():
                square, freedom = least_joint_distance(sides[:, None] * shifts[:, group], noise[:, :, group])
                parts.append((square, float(freedom)))
        together = least_distance(parts) / float(charged.sum())
        if together > 1.02:
            yield PRIVACY.verdict("independent draws", f"the noise of the steps of {where} is not independent, or some "
                                  f"have less: together they have {1 / math.sqrt(together):.3g} of the charged noise")
            return
    scaled, few = [], _quiet(_with_few(stage, _FEW), sketch).rows
    for group in sketch.groups.values():
        spread = few[:, :, group].std(axis=(0, 2), keepdims=True)
        if (spread > 0).all():
            scaled.append((few[:, :, group] / spread).reshape(len(few) * few.shape[1], -1))
    each = np.concatenate(scaled, axis=1) if scaled else np.ones((1, 1))
    each = each.reshape(len(few), few.shape[1], -1)[:, 0] if adaptive else each
    still = not (each != 0).any(axis=1).all()
    if still or spread_of_norms(each) > _UNEVEN * (1 + 8 / math.sqrt(each.shape[1])):
        yield PRIVACY.verdict("independent draws", f"the noise of a step of {where} " + (
            "is missing in some steps" if still else "varies in size with the patients that are drawn"))
        return
    yield PRIVACY.verdict("independent draws", None)
    wrong = law_of(claim, rows[:, 0], sketch)
    yield PRIVACY.verdict("law of the noise", f"{where}: {wrong}" if wrong else None, where=where)


def _with_few(stage: Stage, least: int) -> Stage:
    """The stage with fewer patients, which takes less time, if the technique works with so few."""
    least = max(least, *(math.ceil(float(getattr(layer, "batch", None) or 0)) + 2 for layer in stage.technique.layers))
    site = stage.sites[0]
    small = replace(stage, sites=[replace(site, train=list(site.train)[:least])])
    return small if rehearse(small, catch=True, quick=True).error is None else stage


def _draws(stage: Stage, claim: Claim) -> Iterator[Finding]:
    """Whether patients are drawn as is charged, counted without training."""
    rates = {release.sample_rate for release, _ in claim.charges if isinstance(release, Gaussian)}
    if rates == {1.0}:
        yield PRIVACY.verdict("draws", None)
        return
    site = stage.sites[0]
    counting = replace(stage, sites=[marked(site)], trainer=replace(stage.trainer, steps=_COUNTED_STEPS))
    drawn, charged = [], 1.0
    for seed in range(_COUNTED):
        seen = rehearse(counting, rounds=3, seed=seed, count=True, quick=True)
        for number in range(3):
            drawn.append([[k in batch for k in range(len(site.train))]
                          for batch in seen.batches[number, site.name][:_COUNTED_STEPS]])
        charged = max(release.sample_rate for release, _ in seen.equipped[0, claim.layer]
                      if isinstance(release, Gaussian))
    if not drawn[0] or charged >= 1:
        yield PRIVACY.verdict("draws", None)
        return
    yield PRIVACY.verdict("draws", odd_draws(np.array(drawn), charged))


#: What is put in the place of some patients: of the first, or of the last and of one held out.
_ELSE = {"a bright scan that is all tumour, of other voxels": True,
         "other scans of the last patient and of one held out": False}


def _leaving(stage: Stage, claim: Claim) -> Iterator[Finding]:
    """What finally leaves after training and all techniques, for usual patients and for others in their place."""
    (usual, *others), site = stage.sites[0].train, stage.sites[0].name
    held_out = list(stage.sites[0].val) or [replace(usual, id="a patient held out")]
    every = claim.charges[0].terms.unit == "site"
    sketch = Sketch.of(stage.like)
    stage = replace(stage, trainer=replace(stage.trainer, lr=1.0, steps=1))

    def samples(train: Sequence[Patient], val: Sequence[Patient]) -> Samples:
        return collect(replace(stage, sites=[Site(site, list(train), list(val))]), None, seeds=range(_FINAL_RUNS),
                       rounds=3, sketch=sketch, site=site, at_server=False,
                       views=[lambda seen, number: seen.sent[number][site].delta])

    def numbers(found: Samples, number: int) -> dict[str, Floats]:
        size = found.entries[-1].shape[2]
        return statistics(found.entries[-1][:, number], found.sums[:, number], signs=np.ones(size),
                          heavy=np.zeros(size, dtype=bool), single=True)

    before = samples([usual, *others], held_out)
    # Sampling makes ε smaller only while nobody knows how many were drawn.
    drawn = any(isinstance(release, Gaussian) and release.sample_rate < 1 for release, _ in claim.charges)
    for key in ("weight", "steps") if drawn else ():
        if any(len({run[number].get(key) for run in before.outcomes}) > 1 for number in range(3)):
            yield PRIVACY.verdict("beside the update", f"{key} differs between draws of the same patients, whose "
                                  "sampling is charged as secret")
            return
    for name, first in _ELSE.items():
        # A replaced patient may be one removed and one added; of two patients the distance is twice as large.
        times = (2 if claim.removes else 1) * (1 if first or every else 2)
        claims: Sequence[Claim] = [claim] * times**2
        after = samples([*map(other_patient, [usual, *others])], [*map(other_patient, held_out)]) if every else samples(
            [other_patient(usual), *others], held_out) if first else samples(
            [usual, *others[:-1], *map(other_patient, others[-1:])], [other_patient(held_out[0]), *held_out[1:]])
        for number in range(3):
            allowed, chi = allowed_of(claims, number + 1), chi_of(claims, number + 1)
            wrong = differing([run[number] for run in before.outcomes], [run[number] for run in after.outcomes],
                              allowed=allowed, covered=frozenset())
            if wrong:
                yield PRIVACY.verdict("beside the update", f"{wrong} depends on a patient, in round {number + 1} and "
                                      f"for {name}")
                return
            far = moved_far(numbers(before, number), numbers(after, number), chi=chi, allowed=allowed)
            if far:
                yield PRIVACY.verdict("whole update", f"the update sent in round {number + 1} reveals far more of "
                                      f"{name} than was charged: of {far[0]}, {far[1]}", check="sensitivity")
                return
    yield PRIVACY.verdict("beside the update", None)
    yield PRIVACY.verdict("whole update", None, check="sensitivity")
