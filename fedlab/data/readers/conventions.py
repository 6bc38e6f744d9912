"""The meaning of the values in a label map: several conventions in files, one inside fedlab.

Inside fedlab 1 is necrotic or non-enhancing core, 2 oedema, 4 enhancing tumour, as in BraTS 2017 to 2021. Other data
sets use the same values with other meanings. A convention is therefore stated, or it follows from a description beside
the labels, from the challenge that patients' ids name, from the layout, or from values that permit a single reading.
Anything else is an error, never a guess.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np

from fedlab.core.errors import DataError
from fedlab.data.cache import file_state
from fedlab.data.readers.nifti import read_volume

__all__ = ["CONVENTIONS", "Convention", "check_convention", "convention_of_layout", "count_values", "describe",
           "detect_convention", "file_values", "from_internal", "rounded", "to_internal", "wrong_values"]

#: Label conventions: value in the file -> label inside fedlab (1 core, 2 oedema, 4 enhancing, 0 no tumour).
CONVENTIONS: Mapping[str, Mapping[int, int]] = {
    "brats2021": {0: 0, 1: 1, 2: 2, 4: 4},  # BraTS 2017 to 2021 and FeTS (Baid et al. 2021)
    "brats2023": {0: 0, 1: 1, 2: 2, 3: 4},  # BraTS 2023 and later: 3 is enhancing
    "brats2024": {0: 0, 1: 1, 2: 2, 3: 4, 4: 0},  # after treatment: 4 is resection cavity (de Verdier et al. 2024)
    "msd": {0: 0, 1: 2, 2: 1, 3: 4},  # Task01_BrainTumour: 1 oedema, 2 non-enhancing (Antonelli et al. 2022)
    "brats2013": {0: 0, 1: 1, 2: 2, 3: 1, 4: 4},  # 1 necrosis, 3 non-enhancing (Menze et al. 2015)
    # BraTS-PEDs 2024: 1 enhancing, 2 non-enhancing, 3 cyst, 4 oedema (Kazerooni et al. 2024, arXiv:2404.15009)
    "brats2024ped": {0: 0, 1: 4, 2: 1, 3: 1, 4: 2},
}
#: The convention that a layout was published with.
_OF_LAYOUT = {"brats2018": "brats2021", "brats2019": "brats2021", "brats2020": "brats2021", "brats2021": "brats2021",
              "fets": "brats2021", "brats2023": "brats2023"}
#: The challenges of BraTS 2023 and later, and data sets of their sources: how ids begin, and the conventions of the
#: published label maps. The first pattern that matches counts. BraTS-PEDs 2023 has the values of "brats2023";
#: BraTS-MEN-RT marks one volume only.
_CHALLENGES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "BraTS-GLI after treatment": (r"brats-gli-\d+-1\d\d", ("brats2024",)),
    "BraTS-GLI": (r"brats-gli-", ("brats2023", "brats2024")),
    "BraTS-MET": (r"brats-met-", ("brats2023", "brats2024")),
    "BraTS-MEN-RT": (r"brats-men-rt-", ()),
    "BraTS-MEN": (r"brats-men-", ("brats2023",)),
    "BraTS-SSA": (r"brats-ssa-", ("brats2023",)),
    "BraTS-GoAT": (r"brats-goat-", ("brats2023",)),
    "BraTS-PED": (r"brats-ped-", ("brats2024ped", "brats2023")),
    "UPENN-GBM": (r"upenn-gbm-", ("brats2021",)),
    "UCSF-PDGM": (r"ucsf-pdgm-", ("brats2021",)),
    "BraTS-TCGA": (r"tcga-", ("brats2021",)),
}
_TOLERANCE = 1e-3  # of labels stored as floats
_MEANINGS = {0: "no tumour", 1: "core", 2: "oedema", 4: "enhancing"}
#: Words in a description, in the order in which they are tried -> label inside fedlab.
_WORDS = ((r"background|cavity|\brc\b", 0), (r"o?edema|hyperintensit|snfh|\bed\b", 2),
          (r"non.?enhanc|necro|\bnet|\bncr|cyst|\bcc\b", 1), (r"enhanc|\bet\b", 4))


@dataclass(frozen=True, kw_only=True)
class Convention:
    """The label convention of a folder and the reason for it.

    Attributes:
        name: one of `CONVENTIONS`; None where no patient has a label map, or where challenges differ.
        reason: in words.
        by_challenge: the convention of each challenge that patients' ids name; "" for the other patients.
    """

    name: str | None
    reason: str
    by_challenge: Mapping[str, str] = field(default_factory=dict)

    def of(self, patient: str) -> str | None:
        """The convention of one patient, by its id; None if it is unknown."""
        return self.by_challenge.get(_challenge(patient), self.name)

    @property
    def names(self) -> str:
        """The name, or the names in a folder of several challenges; "" where there is none."""
        return self.name or " and ".join(sorted(set(self.by_challenge.values())))

    def __str__(self) -> str:
        return f"label convention {self.names} ({self.reason})" if self.names else self.reason


def check_convention(name: str | None) -> None:
    """Refuses an unknown convention.

    Raises:
        ValueError: `name` is neither None nor in `CONVENTIONS`.
    """
    if name is not None and name not in CONVENTIONS:
        raise ValueError(f"label_convention must be one of {', '.join(map(repr, CONVENTIONS))}, got {name!r}")


def rounded(array: np.ndarray) -> np.ndarray:
    """A label map with whole numbers where floats are whole but for rounding; the array itself in any other case."""
    if array.dtype.kind != "f":
        return array
    whole = np.rint(array)
    with np.errstate(invalid="ignore"):
        return whole if (np.abs(array - whole) < _TOLERANCE).all() else array  # False where anything is NaN or Inf


def count_values(array: np.ndarray) -> dict[float, int]:
    """Number of voxels by value; of more than 64 values the smallest 64 are given."""
    whole = rounded(array)
    is_whole = whole is not array or array.dtype.kind in "ui"
    array = whole
    low, high = array.min(), array.max()
    if is_whole and float(high) - float(low) < 65536:
        flat = array.ravel(order="K")
        counts = np.bincount((flat if low == 0 else flat - np.float64(low)).astype(np.intp, copy=False))
        return {float(low) + float(step): int(counts[step]) for step in np.flatnonzero(counts)[:64]}
    values, numbers = np.unique(array, return_counts=True)
    return {float(value): int(number) for value, number in zip(values[:64], numbers[:64], strict=True)}


def file_values(path: Path) -> frozenset[float]:
    """The values in a label file; an unchanged file is read once.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        return _file_values(path, *file_state(path))
    except OSError as error:
        raise DataError(f"{path.name}: cannot be read ({error})", code="no-file") from error


@lru_cache(maxsize=20_000)
def _file_values(path: Path, *state: str | int) -> frozenset[float]:
    return frozenset(count_values(np.asarray(read_volume(path).array)))


def wrong_values(values: Collection[float], convention: str, patient: str = "") -> str:
    """Why the values of a patient's label map do not follow a convention, in words; "" if they do."""
    known = CONVENTIONS[convention]
    unknown = sorted(value for value in values if value not in known)
    if not unknown:
        return ""
    fitting = _fitting(values, _possible(_challenge(patient)))
    hint = (f"if they follow another convention, pass {_option(fitting)}"
            if fitting else f"none of the conventions {', '.join(map(repr, CONVENTIONS))} has these values")
    return f"holds the values {_shown(unknown)}; convention {convention!r} has {', '.join(map(str, known))}; {hint}"


def to_internal(array: np.ndarray, convention: str) -> np.ndarray:
    """A label map in fedlab's values, uint8, same shape; unknown values become 0.

    Check them first with `wrong_values`.
    """
    label = np.zeros_like(array, dtype=np.uint8)
    for value, inside in CONVENTIONS[convention].items():
        if inside:
            here = np.abs(array - value) < _TOLERANCE if array.dtype.kind == "f" else array == value
            np.copyto(label, inside, where=here)
    return label


def from_internal(label: np.ndarray, convention: str) -> np.ndarray:
    """Labels 0, 1, 2 and 4 in the values of a convention, uint8, same shape: the inverse of `to_internal`.

    Where two values of the convention have one meaning, the smaller is written.
    """
    table = np.zeros(5, dtype=np.uint8)
    for value, inside in sorted(CONVENTIONS[convention].items(), reverse=True):
        table[inside] = value
    return np.asarray(table[label])


def describe(convention: str, values: Collection[float] | None = None) -> str:
    """The meaning of values of a convention, by default of all but 0, such as "1 core, 2 oedema, 4 enhancing"."""
    table = CONVENTIONS[convention]
    chosen = table.keys() - {0} if values is None else values
    return ", ".join(f"{value:g} {_MEANINGS[table[int(value)]]}" for value in sorted(chosen))


def convention_of_layout(layout: str) -> str:
    """The convention of label maps that are written into a folder of this layout in which no patient is labelled."""
    return "msd" if layout in ("msd", "nnunet") else _OF_LAYOUT.get(layout, "brats2021")


def detect_convention(values: Mapping[str, Collection[float]], *, layout: str,
                      described: Mapping[int, str] | None = None, stated: str | None = None) -> Convention:
    """The label convention of a folder, with the reason; in a folder of several challenges, that of each.

    A few patients with other values do not change it; they are reported individually when they are read.

    Args:
        values: the values in each labelled patient's label map.
        layout: one of `fedlab.data.readers.layouts.LAYOUTS`.
        described: meaning of each value according to dataset.json.
        stated: the convention that the user states; it is taken as given.

    Raises:
        DataError: more than one convention is possible, or none; the message names the option to set.
        ValueError: `stated` is unknown.
    """
    check_convention(stated)
    if stated is not None:
        return Convention(name=stated, reason="stated")
    if not values:
        return Convention(name=None, reason="no patient has a label map")
    if described is not None:
        name, why = _expect([_from_description(described)], values, "dataset.json says " + ", ".join(
            f"{value} is {text}" for value, text in sorted(described.items())), list(CONVENTIONS))
        return Convention(name=name, reason=why)
    groups: dict[str, dict[str, Collection[float]]] = {}
    for patient, own in values.items():
        groups.setdefault(_challenge(patient), {})[patient] = own
    found: dict[str, tuple[str, str]] = {}
    for challenge, members in groups.items():
        try:
            found[challenge] = _of_group(challenge, members, layout)
        except DataError as error:
            if len(groups) == 1:
                raise
            raise DataError(f"{challenge or 'other patients'}: {error}. The option holds for a whole folder: move "
                            f"these patients ({len(members)}) to a folder of their own", code=error.code) from error
    names = {name for name, _ in found.values()}
    reason = "; ".join(f"{challenge or 'other patients'}: {name}, {why}" if len(found) > 1 else why
                       for challenge, (name, why) in found.items())
    return Convention(name=names.pop() if len(names) == 1 else None, reason=reason,
                      by_challenge={challenge: name for challenge, (name, _) in found.items()})


def _of_group(challenge: str, values: Mapping[str, Collection[float]], layout: str) -> tuple[str, str]:
    """The convention of the patients of one challenge and the reason; "" for patients whose ids name none."""
    published = list(_CHALLENGES[challenge][1]) if challenge else [_OF_LAYOUT[layout]] if layout in _OF_LAYOUT else []
    if challenge and not published:
        raise DataError(f"the label maps of {challenge} mark one gross tumour volume, which tells nothing about core, "
                        f"oedema and enhancing tumour; use patients with labels of all three", code="label-convention")
    present = set().union(*values.values()) - {0.0}
    if present == {1.0}:
        raise DataError(f"no label map holds another value than 0 and 1. A mask of one region does not tell core, "
                        f"oedema and enhancing tumour apart: use label maps of all three, or, if 1 is one of them, "
                        f"pass {_option(published or CONVENTIONS)}", code="label-convention")
    if not published:
        return _from_values(values)
    # In the published maps a cavity occurs beside enhancing tumour. 4 without any 3 may be the 4 of BraTS 2021.
    if len(published) > 1 and "brats2024" in published and not any({3.0, 4.0} <= set(own) for own in values.values()):
        published.remove("brats2024")
    why = f"ids of {challenge}" if challenge else f"layout {layout} uses it"
    return _expect(published, values, why, _possible(challenge))


def _challenge(patient: str) -> str:
    """The challenge that a patient's id names; "" if none."""
    return next((name for name, (start, _) in _CHALLENGES.items() if re.match(start, patient.lower())), "")


def _possible(challenge: str) -> list[str]:
    """The conventions that the label maps of a challenge may follow; those before 2023 use the values of BraTS 2021."""
    return list(dict.fromkeys(["brats2021", *_CHALLENGES[challenge][1]])) if challenge else list(CONVENTIONS)


def _expect(names: Sequence[str], values: Mapping[str, Collection[float]], why: str,
            possible: Collection[str]) -> tuple[str, str]:
    """The expected convention, unless most patients whose values distinguish conventions contradict it."""
    telling = {patient: own for patient, own in values.items() if set(own) - {0.0, 1.0, 2.0} and _fitting(own)}
    against = [patient for patient, own in telling.items() if not _fitting(own, names)]
    if against and 2 * len(against) >= len(telling):
        held = set().union(*(values[patient] for patient in against))
        raise DataError(f"label convention {' or '.join(map(repr, names))} was expected ({why}), but {len(against)} of "
                        f"the {len(telling)} label maps that distinguish conventions ({', '.join(against[:3])}"
                        f"{', …' if len(against) > 3 else ''}) hold other values: {_shown(held)}. "
                        f"{_ask(_fitting(held, possible))}",
                        code="label-convention")
    present = set().union(*(own for own in values.values() if _fitting(own, names)))
    shown = _shown(set().union(*values.values()))
    return _only_reading(_fitting(present, names), present), f"{why}; the values are {shown}"


def _from_values(values: Mapping[str, Collection[float]]) -> tuple[str, str]:
    """The only reading that the values permit; patients whose values fit no convention are not considered."""
    sound = [own for own in values.values() if _fitting(own)]
    if not sound:
        raise DataError(f"no label convention has the values {_shown(set().union(*values.values()))}; {_ask([])}",
                        code="label-convention")
    present = set().union(*sound) - {0.0}
    # With 4 but without 3, "brats2024" would mean that no patient's tumour enhances. Children's tumours are read as
    # such only where ids or the user say so.
    fitting = [name for name in _fitting(present) if 3.0 in present or 4.0 not in present
               or name not in ("brats2024", "brats2024ped")]
    return _only_reading(fitting, present), f"the values are {_shown(present)}, which permit one reading only"


def _only_reading(names: Sequence[str], present: Collection[float]) -> str:
    """The first of several conventions that give the values one meaning."""
    present = set(present) - {0.0}
    if len({describe(name, present) for name in names}) == 1:
        return names[0]
    meanings = "; ".join(f"{name!r} reads {describe(name, present)}" for name in names)
    raise DataError(f"the label values {_shown(present)} alone do not determine their meaning: "
                    f"{meanings or 'no convention has all of them'}. {_ask(names)}", code="label-convention")


def _from_description(described: Mapping[int, str]) -> str:
    meaning: dict[int, int] = {}
    for value, text in described.items():
        kind = 0 if value == 0 else next((kind for words, kind in _WORDS if re.search(words, text.lower())), None)
        if kind is None:
            raise DataError(f"dataset.json names label {value} {text!r}, which is not recognised. {_ask(CONVENTIONS)}",
                            code="label-convention")
        meaning[value] = kind
    for name, known in CONVENTIONS.items():
        if {**meaning, 0: 0} == dict(known):
            return name
    raise DataError(f"dataset.json describes the labels {dict(described)}, which is no known convention. "
                    f"{_ask(CONVENTIONS)}", code="label-convention")


def _fitting(values: Collection[float], names: Collection[str] = tuple(CONVENTIONS)) -> list[str]:
    """Those of the conventions that have all the values."""
    return [name for name in names if all(value in CONVENTIONS[name] for value in values)]


def _option(names: Collection[str]) -> str:
    return f"label_convention={' or '.join(map(repr, names))} (--label-convention on the command line)"


def _ask(names: Collection[str]) -> str:
    return f"Find out which convention they follow and pass {_option(names or CONVENTIONS)}"


def _shown(values: Collection[float]) -> str:
    few = sorted(values)[:9]
    return ", ".join(f"{value:g}" for value in few) + (", …" if len(values) > 9 else "")
