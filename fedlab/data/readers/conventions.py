"""The meaning of the values in a label map: several conventions in files, one inside fedlab.

Inside fedlab 1 is necrotic or non-enhancing core, 2 oedema, 4 enhancing tumour, as in BraTS 2017 to 2021. Other data
sets use the same values with other meanings. A convention is therefore stated, or it follows from the layout, from a
description beside the labels, or from values that permit a single reading. Anything else is an error, never a guess.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from fedlab.core.errors import DataError
from fedlab.data.readers.nifti import read_volume

__all__ = ["CONVENTIONS", "Convention", "check_convention", "convention_of_layout", "count_values", "describe",
           "detect_convention", "file_values", "from_internal", "to_internal", "wrong_values"]

#: Label conventions: value in the file -> label inside fedlab (1 core, 2 oedema, 4 enhancing, 0 no tumour).
CONVENTIONS: Mapping[str, Mapping[int, int]] = {
    "brats2021": {0: 0, 1: 1, 2: 2, 4: 4},  # BraTS 2017 to 2021 and FeTS (Baid et al. 2021)
    "brats2023": {0: 0, 1: 1, 2: 2, 3: 4},  # BraTS 2023 and later: 3 is enhancing
    "brats2024": {0: 0, 1: 1, 2: 2, 3: 4, 4: 0},  # after treatment: 4 is resection cavity (de Verdier et al. 2024)
    "msd": {0: 0, 1: 2, 2: 1, 3: 4},  # Task01_BrainTumour: 1 oedema, 2 non-enhancing (Antonelli et al. 2022)
    "brats2013": {0: 0, 1: 1, 2: 2, 3: 1, 4: 4},  # 1 necrosis, 3 non-enhancing (Menze et al. 2015)
}
#: The convention that a layout was published with.
_OF_LAYOUT = {"brats2018": "brats2021", "brats2019": "brats2021", "brats2020": "brats2021", "brats2021": "brats2021",
              "fets": "brats2021", "brats2023": "brats2023"}
_TOLERANCE = 1e-3  # of labels stored as floats
_MEANINGS = {0: "no tumour", 1: "core", 2: "oedema", 4: "enhancing"}
#: Words in a description, in the order in which they are tried -> label inside fedlab.
_WORDS = ((r"background|cavity", 0), (r"o?edema|hyperintensit|snfh", 2), (r"non.?enhanc|necro|\bnet|\bncr|\bnetc", 1),
          (r"enhanc|\bet\b", 4))


@dataclass(frozen=True, kw_only=True)
class Convention:
    """A label convention and the reason for it.

    Attributes:
        name: one of `CONVENTIONS`; None where no patient has a label map.
        reason: in words.
    """

    name: str | None
    reason: str

    def __str__(self) -> str:
        return f"label convention {self.name} ({self.reason})" if self.name else self.reason


def check_convention(name: str | None) -> None:
    """Refuses an unknown convention.

    Raises:
        ValueError: `name` is neither None nor in `CONVENTIONS`.
    """
    if name is not None and name not in CONVENTIONS:
        raise ValueError(f"label_convention must be one of {', '.join(map(repr, CONVENTIONS))}, got {name!r}")


def count_values(array: np.ndarray) -> dict[float, int]:
    """Number of voxels by value; of more than 64 values the smallest 64 are given."""
    is_whole = array.dtype.kind in "ui"
    if array.dtype.kind == "f":
        whole = np.rint(array)
        with np.errstate(invalid="ignore"):
            is_whole = bool((np.abs(array - whole) < _TOLERANCE).all())  # False where anything is NaN or Inf
        array = whole if is_whole else array
    low, high = array.min(), array.max()
    if is_whole and float(high) - float(low) < 65536:
        counts = np.bincount((array.ravel(order="K") - low).astype(np.intp, copy=False))
        return {float(low) + float(step): int(counts[step]) for step in np.flatnonzero(counts)[:64]}
    values, numbers = np.unique(array, return_counts=True)
    return {float(value): int(number) for value, number in zip(values[:64], numbers[:64], strict=True)}


def file_values(path: Path) -> frozenset[float]:
    """The values in a label file; an unchanged file is read once.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        state = path.stat()
    except OSError as error:
        raise DataError(f"{path.name}: cannot be read ({error})", code="no-file") from error
    return _file_values(path, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=20_000)
def _file_values(path: Path, size: int, changed: int) -> frozenset[float]:
    return frozenset(count_values(np.asarray(read_volume(path).array)))


def wrong_values(values: Collection[float], convention: str) -> str:
    """Why the values of a label map do not follow a convention, in words; "" if they do."""
    known = CONVENTIONS[convention]
    unknown = sorted(value for value in values if value not in known)
    if not unknown:
        return ""
    fitting = _fitting(values)
    hint = (f"if they follow another convention, pass {_option(fitting)}"
            if fitting else f"none of the conventions {', '.join(map(repr, CONVENTIONS))} has these values")
    shown = ", ".join(f"{value:g}" for value in unknown[:6])
    return f"holds the values {shown}; convention {convention!r} has {', '.join(map(str, known))}; {hint}"


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

    Where two values of the convention have one meaning, the first is written.
    """
    table = np.zeros(5, dtype=np.uint8)
    for value, inside in reversed(list(CONVENTIONS[convention].items())):
        table[inside] = value
    return np.asarray(table[label])


def describe(convention: str, values: Collection[float] | None = None) -> str:
    """The meaning of the values of a convention, such as "1 core, 2 oedema, 4 enhancing".

    Args:
        convention: one of `CONVENTIONS`.
        values: the values to describe; None for all but 0.
    """
    table = CONVENTIONS[convention]
    chosen = table.keys() - {0} if values is None else values
    return ", ".join(f"{value:g} {_MEANINGS[table[int(value)]]}" for value in sorted(chosen))


def convention_of_layout(layout: str) -> str:
    """The convention of label maps that are written into a folder of this layout in which no patient is labelled."""
    return "msd" if layout == "msd" else _OF_LAYOUT.get(layout, "brats2021")


def detect_convention(values: Mapping[str, Collection[float]], *, layout: str,
                      described: Mapping[int, str] | None = None, stated: str | None = None) -> Convention:
    """The label convention of a folder, with the reason.

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
        return _confirm(_from_description(described), values, "dataset.json says " + ", ".join(
            f"{value} is {text}" for value, text in sorted(described.items())))
    if layout in _OF_LAYOUT:
        return _confirm(_OF_LAYOUT[layout], values, f"layout {layout} uses it")
    return _from_values(values)


def _confirm(name: str, values: Mapping[str, Collection[float]], why: str) -> Convention:
    """The expected convention, unless most patients whose values distinguish conventions contradict it."""
    telling = {patient: own for patient, own in values.items() if set(own) - {0.0, 1.0, 2.0} and _fitting(own)}
    against = [patient for patient, own in telling.items() if wrong_values(own, name)]
    shown = _shown(set().union(*values.values()))
    if not against or 2 * len(against) < len(telling):
        return Convention(name=name, reason=f"{why}; the values are {shown}")
    fitting = _fitting(set().union(*(values[patient] for patient in against)))
    raise DataError(f"label convention {name!r} was expected ({why}), but {len(against)} of the {len(telling)} label "
                    f"maps that distinguish conventions ({', '.join(against[:3])}{', …' if len(against) > 3 else ''}) "
                    f"hold other values: {shown}. {_ask(fitting)}", code="label-convention")


def _from_values(values: Mapping[str, Collection[float]]) -> Convention:
    """The only reading that the values permit; patients whose values fit no convention are not considered."""
    sound = [own for own in values.values() if _fitting(own)]
    if not sound:
        raise DataError(f"no label convention has the values {_shown(set().union(*values.values()))}; {_ask([])}",
                        code="label-convention")
    present = set().union(*sound) - {0.0}
    # With 4 but without 3, "brats2024" would mean that no patient's tumour enhances.
    fitting = [name for name in _fitting(present) if name != "brats2024" or 3.0 in present or 4.0 not in present]
    readings = {tuple(CONVENTIONS[name][int(value)] for value in sorted(present)) for name in fitting}
    if len(readings) == 1:
        return Convention(name=fitting[0], reason=f"the values are {_shown(present)}, which permit one reading only")
    meanings = [f"{name!r} reads " + ", ".join(f"{value:g} {_MEANINGS[CONVENTIONS[name][int(value)]]}"
                                               for value in sorted(present)) for name in fitting]
    raise DataError(f"the label values {_shown(present)} alone do not determine their meaning: "
                    f"{'; '.join(meanings) or 'no convention has all of them'}. {_ask(fitting)}",
                    code="label-convention")


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


def _fitting(values: Collection[float]) -> list[str]:
    return [name for name, table in CONVENTIONS.items() if all(value in table for value in values)]


def _option(names: Collection[str]) -> str:
    return f"label_convention={' or '.join(map(repr, names))} (--label-convention on the command line)"


def _ask(names: Collection[str]) -> str:
    return f"Find out which convention they follow and pass {_option(names or CONVENTIONS)}"


def _shown(values: Collection[float]) -> str:
    few = sorted(values)[:9]
    return ", ".join(f"{value:g}" for value in few) + (", …" if len(values) > 9 else "")
