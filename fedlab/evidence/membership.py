"""Membership in segmentation: is a patient, whose scan and segmentation the attacker has, among those trained on?

Three attacks: the loss of a final model (S. Yeom et al., Privacy Risk in Machine Learning, CSF 2018, arXiv 1709.01604),
the same against reference models (S. Zarifzadeh, P. Liu, R. Shokri, Low-Cost High-Power Membership Inference Attacks,
ICML 2024, arXiv 2312.03262, "RMIA"), and the update of one site, as the server sees it. Scores are higher for members.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from html import escape
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import nn
from torch.func import functional_call

from fedlab.core.hardware import calling
from fedlab.core.regions import labels_to_regions, regions_to_labels
from fedlab.core.seeds import derive
from fedlab.core.settings import check_choice, check_positive, check_whole
from fedlab.core.types import Patient, Site, Tensors
from fedlab.core.weights import check_fit, trainable
from fedlab.evidence.findings import Finding, Threat
from fedlab.evidence.intervals import Floats, area_under_roc, share_interval, true_positives
from fedlab.evidence.inversion import tumour_patch
from fedlab.run.federate import federate
from fedlab.training.defaults import DiceBCE
from fedlab.training.trainer import SiteTrainer

__all__ = ["RMIA", "LossThreshold", "Membership", "RoundMembership", "UpdateMembership", "shadow_models"]

Loss = Callable[[Any, torch.Tensor], torch.Tensor]
_WANTS = "whether a patient is among those trained on"


@dataclass(frozen=True, kw_only=True, eq=False)
class Membership:
    """What an attack on membership found.

    Attributes:
        auc: probability that a member's score lies above a non-member's.
        tpr: share of members that are recognised at 1 % false positives; of fewer than 100 non-members at none.
        members, others: the scores, one per patient.
    """

    auc: Finding
    tpr: Finding
    members: Floats
    others: Floats

    @classmethod
    def of(cls, attack: object, threat: Threat, members: Floats, others: Floats) -> Membership:
        """The findings from scores."""
        about: dict[str, Any] = {"attack": repr(attack), "threat": threat}
        value, low, high = area_under_roc(members, others)
        auc = Finding(**about, measure="AUC", value=value, low=low, high=high, trials=len(members) + len(others),
                      chance=0.5)
        found, false, chance = true_positives(members, others)
        value, low, high = share_interval(found, len(members))
        tpr = Finding(**about, measure=f"TPR at 1 % FPR ({false} of {len(others)})", value=value, low=low, high=high,
                      trials=len(members), chance=chance)
        return cls(auc=auc, tpr=tpr, members=members, others=others)

    @property
    def findings(self) -> tuple[Finding, ...]:
        """The AUC, and the true positives."""
        return self.auc, self.tpr

    def __str__(self) -> str:
        return "\n".join(map(str, self.findings))

    def _repr_html_(self) -> str:
        return self.auc._repr_html_() + f"<p>{escape(self.tpr.measure)} {escape(self.tpr.number)}</p>"


@dataclass(frozen=True, kw_only=True)
class LossThreshold:
    """A model has a lower loss on what it was trained on.

    Args:
        loss: of the training; `DiceBCE()` by default.
    """

    loss: Loss | None = None
    threat: ClassVar[Threat] = Threat(who="recipient of the model", wants=_WANTS,
                                      sees="the final model, and scan and segmentation of a patient")

    def __call__(self, model: nn.Module, *, members: Sequence[Patient], others: Sequence[Patient]) -> Membership:
        """Attacks a model.

        Args:
            model: does not change.
            members: patients that it was trained on.
            others: patients of the same kind, best of the same site, that it was not trained on.

        Raises:
            ValueError: no member or no other patient, or one without a label.
        """
        return Membership.of(self, self.threat, -_losses(model, members, self.loss),
                             -_losses(model, others, self.loss))


@dataclass(frozen=True, kw_only=True)
class UpdateMembership:
    """A site's update lowers the loss of its patients, and points where their gradients point.

    Args:
        score: "drop" of a patient's loss from the model before the update to that after it, or "alignment": the cosine
            of the update and the patient's negative gradient at the model before it, which also reads updates that are
            clipped, quantised or thinned.
        loss: of the training; `DiceBCE()` by default.

    Raises:
        ValueError: another score.
    """

    score: Literal["drop", "alignment"] = "drop"
    loss: Loss | None = None
    threat: ClassVar[Threat] = Threat(who="server", wants=_WANTS, sees="the model that a site starts from, the update "
                                      "that it sends, and scan and segmentation of a patient")

    def __post_init__(self) -> None:
        check_choice(("drop", "alignment"), score=self.score)

    def __call__(self, model: nn.Module, delta: Tensors, *, members: Sequence[Patient],
                 others: Sequence[Patient]) -> Membership:
        """Attacks an update.

        Args:
            model: with the weights that the update starts from; does not change.
            delta: the update as it is sent.
            members: patients whom the site trained on.
            others: patients of the same kind, best those that the site holds out.

        Raises:
            ValueError: an update that does not fit the model, no member or no other patient, or one without a label.
        """
        check_fit(trainable(model), delta)
        scored = self._drops if self.score == "drop" else self._alignments
        return Membership.of(self, self.threat, scored(model, delta, members), scored(model, delta, others))

    def _drops(self, model: nn.Module, delta: Tensors, patients: Sequence[Patient]) -> Floats:
        after = {name: p.detach() + delta[name].to(p) for name, p in trainable(model).items()}
        return _losses(model, patients, self.loss) - _losses(model, patients, self.loss, weights=after)

    def _alignments(self, model: nn.Module, delta: Tensors, patients: Sequence[Patient]) -> Floats:
        weights = {name: p.detach().clone().requires_grad_() for name, p in trainable(model).items()}
        update = torch.cat([delta[name].detach().double().flatten() for name in weights])

        def alignment(value: torch.Tensor) -> float:
            gradient = torch.autograd.grad(value, list(weights.values()))
            return -float(torch.cosine_similarity(torch.cat([g.double().flatten() for g in gradient]), update, dim=0))

        with torch.enable_grad():
            return _of_each(model, patients, self.loss, weights, alignment)


@dataclass(frozen=True, kw_only=True, eq=False)
class RoundMembership:
    """`UpdateMembership` on the change of the global model in a round, over a few patients: a leakage curve of a run.

    The change is what every site sees, and every recipient of two successive models; a server that sees single updates
    learns more. A score is the alignment with the gradient on a cube around the patient's tumour, at the model before
    the round: two passes of the network per patient. The result depends on patients, so no guarantee of the run covers
    it; as for `SiteDice`, it is shown where sites are hidden only if the patients are public.

    Args:
        sites: their training patients are the members, those held out the others; both as many.
        every: rounds between two attacks, the first after as many rounds.
        patients: members at most, and others at most, taken from the sites in turn.
        crop: edge of the cube in voxels; that of the smallest scan at most.
        public: whether the patients are public, such as generated ones.

    Raises:
        ValueError: a number below 1, or no patient with a tumour to train on or among those held out.
    """

    sites: Sequence[Site]
    every: int = 1
    patients: int = 8
    crop: int = 32
    public: bool = False
    threat: ClassVar[Threat] = Threat(who="site", wants=_WANTS, sees="the models of two successive rounds, and scan "
                                      "and segmentation of a patient")

    def __post_init__(self) -> None:
        check_whole(every=self.every, patients=self.patients, crop=self.crop)
        if not all(self._groups):
            raise ValueError("leakage compares patients who were trained on with patients who were held out, each with "
                             "a tumour; the sites lack one of the two: give sites with held-out patients (held_out=)")

    def __call__(self, model: nn.Module, moved: Tensors) -> Finding:
        """The AUC of the attack.

        Args:
            model: as before the round; does not change.
            moved: the change of its weights.

        Raises:
            ValueError: the change does not fit the model.
        """
        members, others = self._groups
        found = UpdateMembership(score="alignment")(model, moved, members=members, others=others).auc
        return replace(found, attack=repr(self), threat=self.threat)

    @cached_property
    def _groups(self) -> tuple[list[Patient], list[Patient]]:
        """Cubes of members and others, as many of each."""
        train, held = (_in_turn([[p for p in group if p.label is not None and bool(p.label.any())] for group in groups])
                       for groups in ([site.train for site in self.sites], [site.val for site in self.sites]))
        count = min(self.patients, len(train), len(held))
        edge = min([self.crop, *(size for p in (*train[:count], *held[:count]) for size in p.image.shape[1:])])
        members, others = ([_cube(p, edge) for p in group[:count]] for group in (train, held))
        return members, others

    def __repr__(self) -> str:
        names = ", ".join(site.name for site in self.sites)
        return (f"RoundMembership(sites=<{names}>, every={self.every}, patients={self.patients}, crop={self.crop}"
                f"{', public=True' if self.public else ''})")


@dataclass(frozen=True, kw_only=True)
class RMIA:
    """A member is likelier under the model than under reference models, more so than other patients are (RMIA).

    A patient's likelihood is exp(−loss). Offline, with reference models that were trained without the patients in
    question; generated patients make as many as one likes, see `shadow_models`. With few patients it is calibration by
    difficulty that helps: a patient with a small tumour has a high loss under every model.

    Args:
        gamma: the score is the share of the population over whose ratio that of the patient is, times `gamma`.
        loss: of the training; `DiceBCE()` by default.

    Raises:
        ValueError: `gamma` is not positive.
    """

    gamma: float = 1.0
    loss: Loss | None = None
    threat: ClassVar[Threat] = Threat(who="recipient of the model", wants=_WANTS, sees="the final model, scan and "
                                      "segmentation of a patient, and reference models trained alike on others")

    def __post_init__(self) -> None:
        check_positive(gamma=self.gamma)

    def __call__(self, model: nn.Module, *, members: Sequence[Patient], others: Sequence[Patient],
                 shadows: Sequence[nn.Module], population: Sequence[Patient]) -> Membership:
        """Attacks a model.

        Args:
            model, members, others: as in `LossThreshold`.
            shadows: reference models, trained as the model on other patients.
            population: patients of the same kind that neither was trained on.

        Raises:
            ValueError: a group is empty, or a patient has no label.
        """
        if not shadows:
            raise ValueError("shadows are one or more reference models; `shadow_models` trains them")

        def ratios(patients: Sequence[Patient]) -> Floats:  # logarithms
            under = np.array([-_losses(shadow, patients, self.loss) for shadow in shadows])
            found: Floats = -_losses(model, patients, self.loss) - np.log(np.exp(under).mean(axis=0))
            return found

        known = ratios(population) + np.log(self.gamma)

        def scores(patients: Sequence[Patient]) -> Floats:
            found: Floats = (ratios(patients)[:, None] >= known).mean(axis=1)
            return found

        return Membership.of(self, self.threat, scores(members), scores(others))


def shadow_models(trainer: SiteTrainer, patients: Sequence[Patient], *, count: int = 4, rounds: int = 1,
                  seed: int = 0) -> list[nn.Module]:
    """Reference models for `RMIA`, each trained on a random half of the attacker's own patients.

    Args:
        trainer: as that of the model attacked; its start is that of each model. Its model does not change.
        patients: such as those of `make_cohort`, which are free; at least two.
        count: number of models.
        rounds: of the trainer's steps or epochs.
        seed: of the halves and the training.

    Raises:
        ValueError: fewer than two patients, or `count` or `rounds` below 1.
    """
    check_whole(count=count, rounds=rounds)
    if len(patients) < 2:
        raise ValueError(f"half of the patients trains a reference model, so at least two are needed, got "
                         f"{len(patients)}")
    found = []
    for k in range(count):
        own = copy.deepcopy(trainer)
        rng = np.random.default_rng(derive(seed, "shadow", k))
        half = [patients[i] for i in sorted(rng.permutation(len(patients))[:len(patients) // 2])]
        federate(own, [Site("shadow", half)], rounds=rounds, seed=derive(seed, "shadow", k), progress=False)
        found.append(own.model)
    return found


def _in_turn(groups: Sequence[Sequence[Patient]]) -> list[Patient]:
    """The first of each group, then the second of each, and so on."""
    return [group[k] for k in range(max(map(len, groups), default=0)) for group in groups if k < len(group)]


def _cube(patient: Patient, edge: int) -> Patient:
    """A cube around the middle of the tumour, as a patient."""
    image, regions = tumour_patch(patient, edge)
    return Patient(patient.id, image, regions_to_labels(regions), patient.affine)


def _losses(model: nn.Module, patients: Sequence[Patient], loss: Loss | None, *,
            weights: Tensors | None = None) -> Floats:
    """The loss of each whole scan and its mirror image, without gradients."""
    with torch.no_grad():
        return _of_each(model, patients, loss, weights or trainable(model), float)


def _of_each(model: nn.Module, patients: Sequence[Patient], loss: Loss | None, weights: Tensors,
             score: Callable[[torch.Tensor], float]) -> Floats:
    """A number from the loss of each patient, under other weights of the model in its evaluation mode."""
    if not len(patients):
        raise ValueError("expected one or more patients in each group, got none")
    loss, training, scores = loss or DiceBCE(), model.training, []
    device = next(iter(weights.values())).device
    try:
        model.eval()
        for patient in patients:
            if patient.label is None:
                raise ValueError(f"patient {patient.id} has no label, which the loss needs")
            image, regions = patient.image.float().to(device), labels_to_regions(patient.label).float().to(device)
            # Two volumes: with one, torch takes a slow path on the CPU.
            pair, target = (torch.stack([t, t.flip(1)]) for t in (image, regions))
            with calling(device, torch.float32):
                value = loss(functional_call(model, dict(weights), (pair,)), target)
            scores.append(score(value))
    finally:
        model.train(training)
    return np.array(scores, dtype=np.float64)
