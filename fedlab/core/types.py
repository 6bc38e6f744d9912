"""The vocabulary of a federated run: values that every other module passes around."""

from __future__ import annotations

import copy
import math
from collections import UserDict
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, fields, replace
from decimal import ROUND_CEILING, Context
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch

from fedlab.core.errors import FedlabError
from fedlab.core.patient_checks import check_patient
from fedlab.core.settings import check_within
from fedlab.core.text import counted

__all__ = ["MODALITIES", "MOMENT", "REGIONS", "REPEATS", "Answer", "Cohort", "Failure", "Messages", "Patient", "Round",
           "ServerState", "Site", "SiteState", "Spent", "Tensors", "Update", "Withdrawal", "rounded_up"]

#: Channel order of every image in fedlab.
MODALITIES = ("FLAIR", "T1", "T1c", "T2")
#: Channel order of every segmentation in fedlab: tumour core, whole tumour, enhancing tumour.
REGIONS = ("TC", "WT", "ET")
#: Beside an ε of noise that an adversary with the seed can subtract, and that is drawn in floating point.
REPEATS = "noise repeats with the seed: for research, low bits not covered"

#: Begins the name of a moment among the buffers of a state or an update; no buffer of a network has a "|" in its name.
MOMENT = "optimiser|"
#: Named tensors: a model's weights, or changes of them.
Tensors = Mapping[str, torch.Tensor]
#: Messages of one exchange between sites: sender -> recipient -> bytes, or recipient -> sender -> bytes. The server is
#: called "server".
Messages = Mapping[str, Mapping[str, bytes]]


def _size(tensors: Tensors) -> str:
    return f"{counted(len(tensors), 'tensor')} of {sum(t.numel() for t in tensors.values()):,} numbers"


@dataclass(frozen=True, eq=False)
class Patient:
    """One case, ready for a network.

    Attributes:
        id: the patient's pseudonym.
        image: float16 or float32, shape (4, X, Y, Z), channels in the order of `MODALITIES`, axes
            pointing right, anterior, superior (RAS); z-scored over brain voxels, 0 outside the brain.
        label: uint8, shape (X, Y, Z), BraTS labels (1 necrotic or non-enhancing core, 2 oedema,
            4 enhancing tumour), or None where no expert drew one.
        affine: float64, shape (4, 4), voxel index -> mm in RAS.

    Raises:
        DataError: a type, shape or label value that is not one of these, or an affine that cannot be inverted.

    Example:
        >>> import numpy as np
        >>> import torch
        >>> fl.Patient(id="mine-01", image=torch.zeros(4, 32, 32, 32), label=None, affine=np.diag([3.0, 3.0, 3.0, 1.0]))
        <Patient mine-01: 32x32x32 at 3x3x3 mm, no label>
    """

    id: str
    image: torch.Tensor
    label: torch.Tensor | None
    affine: np.ndarray

    def __post_init__(self) -> None:
        check_patient(self.id, self.image, self.label, self.affine, MODALITIES)

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size along the three axes in mm."""
        x, y, z = (float(v) for v in np.linalg.norm(self.affine[:3, :3], axis=0))
        return x, y, z

    def __repr__(self) -> str:
        grid = "x".join(map(str, self.image.shape[1:]))
        labelled = "labelled" if self.label is not None else "no label"
        return f"<Patient {self.id}: {grid} at {'x'.join(f'{s:g}' for s in self.spacing_mm)} mm, {labelled}>"


@dataclass(frozen=True, eq=False)
class Site:
    """One institution with private patients.

    Attributes:
        name: unique in its run.
        train: patients used for training; any indexable collection with a length.
        val: held-out patients, never trained on.
        card: the data card of the site, if there is one.
        same: groups of patients' ids that are scans of one person each, besides what ids say themselves.
        remarks: what a guarantee of a run on these patients does not cover, such as how they were prepared.

    Example:
        >>> sites = fl.make_cohort(sizes=(4, 4), held_out=1, shape=(32, 32, 32), spacing_mm=6.0)
        >>> fl.Site(name="mine", train=sites[0].train, val=sites[0].val)
        <Site mine: 3 patients to train on, 1 held out>
    """

    name: str
    train: Sequence[Patient]
    val: Sequence[Patient] = ()
    card: Any = None
    same: Sequence[frozenset[str]] = ()
    remarks: Sequence[str] = ()

    def __repr__(self) -> str:
        return f"<Site {self.name}: {counted(len(self.train), 'patient')} to train on, {len(self.val)} held out>"


@dataclass(frozen=True)
class Cohort:
    """The sites that took part in a round, as the server knows them. Its length is the number of updates received.

    Attributes:
        round: number of the round.
        arrived: names of the sites whose updates were received.
        sites: number of sites that could have been chosen.
        sample: probability with which each site is chosen.
    """

    round: int
    arrived: tuple[str, ...]
    sites: int
    sample: float

    def __len__(self) -> int:
        return len(self.arrived)


class Diagnostics(UserDict[str, torch.Tensor]):
    """Tensors by name; anything else is refused where it is set."""

    def __setitem__(self, name: str, value: torch.Tensor) -> None:
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise TypeError(f"diagnostics are tensors by name, got {type(value).__name__} under {name!r}; set "
                            "torch.tensor(...)")
        super().__setitem__(name, value)


class _Owned:
    """A state in which each owner has a namespace of tensors."""

    namespaces: dict[str, dict[str, torch.Tensor]]
    owner: str

    @property
    def own(self) -> dict[str, torch.Tensor]:
        """The namespace of the present owner, kept from round to round."""
        return self.namespaces.setdefault(self.owner, {})

    def of(self, owner: str) -> Self:
        """A view of the same state for another owner."""
        return replace(self, owner=owner)  # type: ignore[type-var]

    def copy(self) -> Self:
        """A state that can be changed without changing this one; it shares the tensors."""
        parts = {f.name: copy.copy(getattr(self, f.name)) for f in fields(self)}  # type: ignore[arg-type]
        parts["namespaces"] = {owner: dict(slots) for owner, slots in self.namespaces.items()}
        return replace(self, **{**parts, "ledger": copy.deepcopy(parts["ledger"])})  # type: ignore[type-var]


@dataclass(eq=False)
class SiteState(_Owned):
    """What a site keeps for itself during one run, and what it is shown of the server's in the present round.

    Each owner (the optimiser, the strategy, each technique) has a namespace of tensors: a hook is given a view whose
    `own` is the namespace of its owner, and changes it in place. Only the ledger outlives the run, in a store that is
    named (`fedlab.privacy.accounting.ledger_file`).

    Attributes:
        enrolled: whether the site has belonged to the run from its first round, so that a lost state is noticed.
        updates: number of updates sent.
        round: number of the present round.
        namespaces: owner -> name -> tensor.
        diagnostics: tensors for the site's own eyes, such as gradient norms; no guarantee covers them.
        ledger: the record of privacy spent, as plain values; `fedlab.privacy.accounting.ledger.Ledger` reads and writes
            it. Empty for a site that has released nothing under a guarantee.
        broadcast: tensors that a technique at the server sent with the weights of this round.
        shown: `shown_sha256` of the server's state in this round, where updates are hidden in a sum.
        secrets: keys of the present round; never written to disk.
        owner: whose namespace `own` is.
    """

    enrolled: bool = False
    updates: int = 0
    round: int = 0
    namespaces: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    diagnostics: MutableMapping[str, torch.Tensor] = field(default_factory=Diagnostics)
    ledger: dict[str, Any] = field(default_factory=dict)
    broadcast: dict[str, torch.Tensor] = field(default_factory=dict)
    shown: str = ""
    secrets: dict[str, Any] = field(default_factory=dict)
    owner: str = "site"

    def __post_init__(self) -> None:
        if not isinstance(self.diagnostics, Diagnostics):
            self.diagnostics = Diagnostics(self.diagnostics)

    def __repr__(self) -> str:
        kept = ", ".join(f"{len(slots)} of {owner}" for owner, slots in self.namespaces.items() if slots)
        return f"<SiteState in round {self.round}: {counted(self.updates, 'update')} sent, tensors: {kept or 'none'}>"

    def take_over(self, other: SiteState) -> None:
        """Takes every value of another state, in place: views for other owners share them."""
        for part in fields(self):
            mine, theirs = getattr(self, part.name), getattr(other, part.name)
            if isinstance(mine, MutableMapping):
                mine.clear()
                mine.update(theirs)
            elif part.name != "owner":
                setattr(self, part.name, theirs)


class Withdrawal(NamedTuple):
    """A site that takes no part in a round, and the reason."""

    site: str
    reason: str


class Failure(NamedTuple):
    """A site that failed in a round and sent nothing."""

    site: str
    error: FedlabError


def rounded_up(value: float, digits: int = 3) -> str:
    """A number in a few digits that say at least as much: an ε is never shown smaller than it is."""
    if not math.isfinite(value):
        return str(value)
    return f"{float(Context(prec=digits, rounding=ROUND_CEILING).create_decimal(repr(float(value)))):.{digits}g}"


class Spent(NamedTuple):
    """Privacy spent so far: ε, with δ, unit, adjacency, accountant, and whether the noise repeats with the seed."""

    epsilon: float
    delta: float
    unit: Literal["patient", "site"]
    accountant: str
    adjacency: str
    repeats: bool = False

    def __str__(self) -> str:
        return (f"ε = {rounded_up(self.epsilon)} at δ = {self.delta:g} per {self.unit} ({self.adjacency}, "
                f"{self.accountant} accountant){f'; {REPEATS}' * self.repeats}")


@dataclass(frozen=True, eq=False)
class Update:
    """What leaves a site.

    Attributes:
        site: name of the sender.
        delta: local minus global weights, so the server adds it.
        weight: importance in a weighted mean; number of training patients unless a strategy says otherwise.
        steps: optimiser steps taken.
        metrics: plain numbers such as the mean training loss. They leave the site too.
        spent: privacy spent by the site so far.
        encoded: size in bytes of the delta as it would be sent, if a technique makes it smaller than dense tensors.
        round: number of the round it answers, so that an old update is recognised.
        seconds: time that the site took; 0 under a guarantee, which covers no time.
        buffers: values of the buffers that training has moved, and of moments that are averaged; see `ServerState`.

    Example:
        >>> import torch
        >>> fl.Update(site="mine", delta={"weight": torch.tensor([3.0, 4.0])}, weight=7).norm()
        5.0
    """

    site: str
    delta: Tensors
    weight: float
    steps: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    spent: tuple[Spent, ...] = ()
    encoded: int | None = None
    round: int | None = None
    seconds: float = 0.0
    buffers: Tensors = field(default_factory=dict)

    def __repr__(self) -> str:
        spent = "".join(f"; {spent}" for spent in self.spent)
        size, steps = _size(self.delta), counted(self.steps, "step")
        return f"<Update of {self.site}: {size}, weight {self.weight:g}, {steps}{spent}>"

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Update:
        """The same update with `change` applied to every tensor of the delta."""
        return replace(self, delta={name: change(tensor) for name, tensor in self.delta.items()})

    def norm(self) -> float:
        """Euclidean norm of the whole delta, in float64."""
        # fsum: the same bits in any order of the tensors, such as that of a file.
        return math.sqrt(math.fsum(float(t.double().square().sum()) for t in self.delta.values()))

    def quantile_abs(self, q: float) -> float:
        """The absolute value below which a fraction `q`, between 0 and 1, of the delta's entries lies."""
        check_within(most=1, q=q)
        flat = torch.cat([t.detach().abs().flatten() for t in self.delta.values()])
        return float(flat.kthvalue(max(1, math.ceil(q * flat.numel()))).values)

    @property
    def nbytes(self) -> int:
        """Size in bytes of the delta, as it would be sent or as dense tensors, and of the buffers."""
        delta = sum(t.nbytes for t in self.delta.values()) if self.encoded is None else self.encoded
        return delta + sum(t.nbytes for t in self.buffers.values())


#: What an engine brings from a site: its update, its withdrawal, or its failure.
Answer = Update | Withdrawal | Failure


@dataclass(frozen=True, eq=False)
class ServerState(_Owned):
    """What the server holds between rounds.

    Attributes:
        round: number of the next round, counted from 0.
        params: the global model's trainable weights.
        buffers: the global model's buffers that training moves, such as the statistics of batch norm, if they are part
            of what is federated, and the mean moments of `SiteTrainer(momentum="average")`, "optimiser|weight|slot".
        moments: tensors of the strategy and of the workflow at the server, by name; empty for FedAvg.
        models: the model that a site starts from instead of `model`, by site, in workflows in which sites differ.
        namespaces: owner -> name -> tensor: what techniques keep at the server.
        ledger: the server's own record of privacy spent, as in `SiteState`.
        broadcast: tensors that techniques send to the sites with the weights.
        owner: whose namespace `own` is.
    """

    round: int
    params: Tensors
    moments: Mapping[str, Tensors] = field(default_factory=dict)
    models: Mapping[str, Tensors] = field(default_factory=dict)
    namespaces: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    ledger: dict[str, Any] = field(default_factory=dict)
    broadcast: dict[str, torch.Tensor] = field(default_factory=dict)
    buffers: Tensors = field(default_factory=dict)
    owner: str = "server"

    def __repr__(self) -> str:
        return f"<ServerState before round {self.round}: {_size(self.model)}>"

    @property
    def model(self) -> Tensors:
        """All tensors of the global model, weights and buffers, as `load_weights` takes them."""
        return {**self.params, **{name: b for name, b in self.buffers.items() if not name.startswith(MOMENT)}}

    def holding(self, model: Tensors) -> ServerState:
        """The state with other values of the model's weights and buffers."""
        return replace(self, params={name: model[name] for name in self.params},
                       buffers={**self.buffers, **{name: model[name] for name in self.model if name in self.buffers}})

    def at(self, site: str) -> ServerState:
        """The part that a site is shown: the model that it starts from, and no other site's."""
        return replace(self.holding(self.models.get(site, self.model)), models={}) if self.models else self


@dataclass(frozen=True, eq=False)
class Round:
    """One finished round, as `each_round` yields it.

    Attributes:
        number: counted from 0.
        state: the server's state after the round.
        cohort: names of the sites that were asked to train.
        sites: numbers per site: loss, update norm, weight, steps, bytes sent, seconds.
        spent: privacy spent so far, by site; under "server" the guarantee that noise at the server gives every site.
        absent: sites of the cohort whose update is not in the model, and the reason.
        metrics: numbers about the global model, such as validation Dice.
        seconds: wall time of the round.
        site_states: what each site keeps for itself, by site, where sites work on this machine; empty elsewhere.
        void: why the round has left the model as it was, if it has.
        server_only: kinds of these numbers that must not leave the server; see `fedlab.run.publishable`.
    """

    number: int
    state: ServerState
    cohort: tuple[str, ...]
    sites: Mapping[str, Mapping[str, float]]
    spent: Mapping[str, tuple[Spent, ...]]
    metrics: Mapping[str, float]
    seconds: float
    absent: Mapping[str, str] = field(default_factory=dict)
    site_states: Mapping[str, SiteState] = field(default_factory=dict)
    void: str | None = None
    server_only: frozenset[str] = frozenset()

    def __repr__(self) -> str:
        hidden = "sites" in self.server_only
        sent, asked = len(self.cohort) - len(self.absent), counted(len(self.cohort), "site")
        said = [] if hidden else [f"updates of {sent} of {asked}"]
        said += [] if "validation" in self.server_only else [f"{k} {v:.3f}" for k, v in self.metrics.items()]
        said += [f"void: {self.void}"] if self.void and not hidden else []
        shown = ["server"] * ("server" in self.spent) if hidden else self.spent
        said += [f"{name}: {spent}" for name in shown for spent in self.spent[name]]
        return f"<Round {self.number}: {'; '.join(said)}>"
