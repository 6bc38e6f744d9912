"""The attacks of an assessment: each tries one technique with one seed, and makes a finding of the tries of all seeds.

An attack is any object with the methods of `Attack`. What it returns from `try_on` is kept as JSON, so that an
assessment that was interrupted continues.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import nn

from fedlab.core.regions import regions_to_labels
from fedlab.core.types import Answer, Patient, ServerState, Site, Tensors, Update
from fedlab.core.weights import load_weights
from fedlab.evidence.arms import Arm
from fedlab.evidence.canaries import CanaryAudit
from fedlab.evidence.findings import Finding, Threat
from fedlab.evidence.inversion import tumour_patch
from fedlab.evidence.membership import LossThreshold, Membership, UpdateMembership
from fedlab.evidence.reconstruction import Reconstruction
from fedlab.privacy.base import Privacy
from fedlab.run.local import Local
from fedlab.run.round import Star
from fedlab.training.trainer import SiteTrainer

__all__ = ["Attack", "Canaries", "Case", "ModelMembership", "NotApplicable", "Seen", "SentMembership",
           "SentReconstruction"]


class NotApplicable(ValueError):
    """An attack does not fit a technique; the text is the reason."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """An update as an attacker sees it.

    Attributes:
        delta: the update, or the mean of several.
        sites: whose patients it comes from.
        who, sees: of the threat model.
    """

    delta: Tensors
    sites: Sequence[Site]
    who: Literal["server", "site"]
    sees: str

    def threat(self, threat: Threat) -> Threat:
        """A threat model of an attack on updates, for this attacker."""
        return replace(threat, who=self.who, sees=self.sees)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One technique and one seed, as an attack may use them.

    Attributes:
        arm: with the technique, the trainer and its start.
        sites: of the training.
        seed: of the training.
        state: the server's after the training.
    """

    arm: Arm
    sites: Sequence[Site]
    seed: int
    state: ServerState

    def model(self, params: Tensors | None = None) -> nn.Module:
        """A copy of the network, with the weights before the training or others."""
        model = copy.deepcopy(self.arm.trainer.model)
        load_weights(model, self.arm.trainer.initial_model())
        if params is not None:
            load_weights(model, params)
        return model

    def final(self) -> nn.Module:
        """A copy of the network after the training."""
        return self.model(self.state.model)

    def seen(self, sites: Sequence[Site] | None = None) -> list[Seen]:
        """What the attacker sees of the first round: each update, or their mean where that is all there is to see.

        Under noise at the server the server is trusted, and the attacker is a site that sees the noisy mean; under an
        aggregation that hides updates it is the server, which sees the mean.

        Args:
            sites: that train; those of the case by default.

        Raises:
            NotApplicable: no round with one server, such as of pooled data.
        """
        arm, sites = self.arm, list(self.sites if sites is None else sites)
        if arm.data != "sites" or not isinstance(arm.topology, Star) or arm.engine is not None:
            raise NotApplicable("no round in this process with one server, whose updates could be seen")
        observer = _Observer()
        start = {name: t.clone() for name, t in arm.trainer.initial().items()}
        one_round = replace(arm, rounds=1, trainer=copy.deepcopy(arm.trainer), engine=observer)
        history = one_round.train(sites, seed=self.seed)
        hidden = arm.aggregation is not None and arm.aggregation.hides_updates
        if hidden or (arm.privacy is not None and arm.privacy.works_at_server):
            if history.state is None:
                raise NotApplicable(f"no round was finished: {history.stopped}")
            moved = {name: t - start[name] for name, t in history.state.params.items()}
            sees = "the sum of the updates of a round" if hidden else "the models of two successive rounds"
            return [Seen(delta=moved, sites=sites, who="server" if hidden else "site",
                         sees=f"{sees}, and scan and segmentation of a patient")]
        named = {site.name: site for site in sites}
        return [Seen(delta=update.delta, sites=[named[update.site]], who="server", sees="the model that a site starts "
                     "from, the update that it sends, and scan and segmentation of a patient")
                for update in observer.updates]


class _Observer(Local):
    """Sites in this process; it keeps the updates that they send."""

    def __init__(self) -> None:
        super().__init__()
        self.updates: list[Update] = []

    def train(self, *parts: Any) -> Iterator[Answer]:
        for answer in super().train(*parts):
            if isinstance(answer, Update):
                self.updates.append(answer)
            yield answer


class Attack(Protocol):
    """An attack of an assessment; it prints as the code that makes it.

    With an attribute `once` that is true it is tried with the first seed only.
    """

    def try_on(self, case: Case) -> Mapping[str, Any]:
        """Attacks one technique with one seed, in a worker process; returns plain values.

        Raises:
            NotApplicable: the attack does not fit the technique.
        """

    def found(self, tries: Sequence[Mapping[str, Any]]) -> Finding:
        """The finding from the tries of all seeds."""


@dataclass(frozen=True, kw_only=True)
class SentMembership:
    """`UpdateMembership` on what is sent in the first round; members train, the others are held out at the same sites.

    Args:
        score: as in `UpdateMembership`.
    """

    score: Literal["drop", "alignment"] = "alignment"

    def try_on(self, case: Case) -> Mapping[str, Any]:
        attack, model, out = UpdateMembership(score=self.score), case.model(), []
        for seen in case.seen():
            members, others = [p for site in seen.sites for p in site.train], [p for s in seen.sites for p in s.val]
            if not others:
                continue
            found = attack(model, seen.delta, members=members, others=others)
            out.append({"members": found.members.tolist(), "others": found.others.tolist(), "who": seen.who,
                        "sees": seen.sees})
        if not out:
            raise NotApplicable("no update was sent by a site that holds out patients")
        return {"seen": out}

    def found(self, tries: Sequence[Mapping[str, Any]]) -> Finding:
        seen = [one for of_seed in tries for one in of_seed["seen"]]
        threat = replace(UpdateMembership.threat, who=seen[0]["who"], sees=seen[0]["sees"])
        return Membership.of(self, threat, *(np.concatenate([one[group] for one in seen])
                                             for group in ("members", "others"))).auc


@dataclass(frozen=True, kw_only=True)
class ModelMembership:
    """`LossThreshold` on the final model; members train, the others are held out at the same sites."""

    def try_on(self, case: Case) -> Mapping[str, Any]:
        found = LossThreshold()(case.final(), members=[p for site in case.sites for p in site.train],
                                others=[p for site in case.sites for p in site.val])
        return {"members": found.members.tolist(), "others": found.others.tolist()}

    def found(self, tries: Sequence[Mapping[str, Any]]) -> Finding:
        return Membership.of(self, LossThreshold.threat, *(np.concatenate([one[group] for one in tries])
                                                           for group in ("members", "others"))).auc


@dataclass(frozen=True, kw_only=True)
class Canaries:
    """`CanaryAudit` of one round of the technique, with the trainer's steps: the ε that it shows, once for all seeds.

    Args:
        canaries: their number.
    """

    canaries: int = 1000
    once: ClassVar[bool] = True

    def try_on(self, case: Case) -> Mapping[str, Any]:
        if case.arm.aggregation is not None:
            raise NotApplicable("canaries audit techniques at the sites or at the server, not a sum under encryption")
        audit = CanaryAudit(canaries=self.canaries, steps=case.arm.trainer.steps or 1, seed=case.seed)(
            case.arm.privacy or Privacy())
        claim = f", REFUTED is the claim of {audit.claimed}" * audit.refuted
        return {**asdict(audit.finding), "attack": repr(self), "measure": f"ε of one round{claim}"}

    def found(self, tries: Sequence[Mapping[str, Any]]) -> Finding:
        return _finding(tries[0])


@dataclass(frozen=True, kw_only=True)
class SentReconstruction:
    """`Reconstruction` from what is sent after one plain step on a patch around a tumour, once for all seeds.

    The easiest case for the attacker: one patient, one step, known labels. The prior and the candidates are patches of
    held-out patients of the same sites.

    Args:
        patients: number of patients that are attacked, one site each.
        crop: edge of the patch in voxels.
        steps: of each attack.
    """

    patients: int = 4
    crop: int = 16
    steps: int = 150
    once: ClassVar[bool] = True

    def try_on(self, case: Case) -> Mapping[str, Any]:
        if case.arm.aggregation is not None:
            raise NotApplicable("the update of one patient is never seen, only the sum of several sites")
        scans = [p for site in case.sites for p in site.train if _has_tumour(p)][:self.patients]
        others = [p for site in case.sites for p in site.val if _has_tumour(p)][:19]
        if not scans or not others:
            raise NotApplicable("no patient with a tumour to train on, or none that is held out")
        edge = min(self.crop, *(size for p in (*scans, *others) for size in p.image.shape[1:]))
        patches = [tumour_patch(patient, edge) for patient in scans]
        seen = one_step_each(case, patches)
        found = Reconstruction(steps=self.steps, seed=case.seed)(
            case.model(), [one.delta for one in seen], patches, public=[tumour_patch(one, edge) for one in others])
        threat = replace(Reconstruction.threat, who=seen[0].who)
        return {**asdict(replace(found.correlation, threat=threat)), "attack": repr(self)}

    def found(self, tries: Sequence[Mapping[str, Any]]) -> Finding:
        return _finding(tries[0])


def one_step_each(case: Case, patches: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[Seen]:
    """What is seen of one plain gradient step on each patch (image and regions), each at a site of its own."""
    seen = []
    for image, regions in patches:
        x, y, z = image.shape[1:]
        trainer = SiteTrainer(model=case.model(), steps=1, batch_size=1, crop=(x, y, z), augment=None, optimiser=_sgd,
                              lr=0.1, precision="fp32")
        patient = Patient("patch", image, regions_to_labels(regions), np.eye(4))
        seen += replace(case, arm=replace(case.arm, trainer=trainer)).seen([Site("site", [patient])])
    return seen


def _finding(values: Mapping[str, Any]) -> Finding:
    return Finding(**{**values, "threat": Threat(**values["threat"])})


def _has_tumour(patient: Patient) -> bool:
    return patient.label is not None and bool(patient.label.any())


def _sgd(parameters: Any, lr: float) -> Any:
    return torch.optim.SGD(parameters, lr=lr)
