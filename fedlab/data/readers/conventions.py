"""What the numbers in a label map mean: every convention in use outside, one inside.

Inside fedlab 1 is necrotic or non-enhancing core, 2 oedema, 4 enhancing tumour, as in BraTS 2017 to 2021. The same
numbers mean other things elsewhere, so a convention is stated, or follows from the layout, from a description beside
the labels, or from values that allow no other reading. Anything else is an error, never a guess.
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

__all__ = ["CONVENTIONS", "Convention", "check_convention", "count_values", "detect_convention", "file_values",
           "to_internal", "wrong_values"]

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
_WHOLE = 1e-3  # labels stored as floats may be off by their rounding


@dataclass(frozen=True, kw_only=True)
class Convention:
    """A label convention and why it is the one.

    Attributes:
        name: one of `CONVENTIONS`; None where nobody is labelled.
        reason: in words.
    """

    name: str | None
    reason: str


def check_convention(name: str | None) -> None:
    """Refuses a convention that isn't known.

    Raises:
        ValueError: `name` is neither None nor in `CONVENTIONS`.
    """
    if name is not None and name not in CONVENTIONS:
        raise ValueError(f"label_convention is one of {', '.join(map(repr, CONVENTIONS))}, got {name!r}")


def count_values(array: np.ndarray) -> dict[float, int]:
    """How many voxels have which value; of more than 64 values the smallest 64 are given."""
    if array.dtype.kind == "f":
        whole = np.rint(array)
        with np.errstate(invalid="ignore"):
            near = bool((np.abs(array - whole) < _WHOLE).all())  # False where anything is NaN or Inf
        array = whole if near else array
    low, high = array.min(), array.max()
    if array.dtype.kind in "ui" or near:
        if float(high) - float(low) < 65536:
            counts = np.bincount((array.ravel(order="K") - low).astype(np.intp, copy=False))
            found = np.flatnonzero(counts)[:64]
            return {float(low) + float(step): int(counts[step]) for step in found}
    values, numbers = np.unique(array, return_counts=True)
    return {float(value): int(number) for value, number in zip(values[:64], numbers[:64], strict=True)}


def file_values(path: Path) -> frozenset[float]:
    """The values in a label file; files that didn't change are read once.

    Raises:
        DataError: the file can't be read.
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
    """What is wrong with the values of a label map under a convention, in words; "" where nothing is."""
    known = CONVENTIONS[convention]
    strange = sorted(value for value in values if value not in known)
    if not strange:
        return ""
    others = _fitting(values)
    hint = (f"if they follow another convention, say {_say(others)}"
            if others else f"label_convention knows {', '.join(map(repr, CONVENTIONS))} and none of them has these")
    shown = ", ".join(f"{value:g}" for value in strange[:6])
    return f"holds the values {shown}; convention {convention!r} knows {', '.join(map(str, known))}; {hint}"


def to_internal(array: np.ndarray, convention: str) -> np.ndarray:
    """A label map in fedlab's values, uint8, same shape; values the convention doesn't know become 0.

    Check them first with `wrong_values`.
    """
    label = np.zeros_like(array, dtype=np.uint8)
    for value, inside in CONVENTIONS[convention].items():
        if inside:
            here = np.abs(array - value) < _WHOLE if array.dtype.kind == "f" else array == value
            np.copyto(label, inside, where=here)
    return label


def detect_convention(values: Mapping[str, Collection[float]], *, layout: str,
                      described: Mapping[int, str] | None = None, stated: str | None = None) -> Convention:
    """The label convention of a cohort, with the reason.

    A few patients with other values don't change it: they are reported one by one when they are read.

    Args:
        values: the values in each labelled patient's label map.
        layout: as `fedlab.data.readers.layouts` names it.
        described: what a description beside the labels (dataset.json) says each value is.
        stated: the convention the user states; it is taken as it is.

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
        name = _from_description(described)
        return _confirm(name, values, "dataset.json says " + ", ".join(
            f"{value} is {text}" for value, text in sorted(described.items())))
    if layout in _OF_LAYOUT:
        return _confirm(_OF_LAYOUT[layout], values, f"layout {layout} comes with it")
    return _from_values(values)


def _confirm(name: str, values: Mapping[str, Collection[float]], why: str) -> Convention:
    """The expected convention, unless the patients whose labels tell conventions apart speak against it."""
    telling = {patient: seen for patient, seen in values.items() if set(seen) - {0.0, 1.0, 2.0} and _fitting(seen)}
    against = [patient for patient, seen in telling.items() if wrong_values(seen, name)]
    shown = _shown(set().union(*values.values()))
    if not against or 2 * len(against) < len(telling):
        return Convention(name=name, reason=f"{why}; the values are {shown}")
    fitting = _fitting(set().union(*(values[patient] for patient in against)))
    raise DataError(f"label convention {name!r} was expected ({why}), but {len(against)} of the {len(telling)} label "
                    f"maps that could tell ({', '.join(against[:3])}{', …' if len(against) > 3 else ''}) hold other "
                    f"values: {shown}. {_ask(fitting)}", code="label-convention")


def _from_values(values: Mapping[str, Collection[float]]) -> Convention:
    """The one reading that the values allow: patients whose values no convention has are left out of the count."""
    sound = {patient: seen for patient, seen in values.items() if _fitting(seen)}
    seen = set().union(*sound.values()) - {0.0}
    if not sound:
        raise DataError(f"no label convention has the values {_shown(set().union(*values.values()))}; {_ask([])}",
                        code="label-convention")
    fitting = _fitting(seen)
    # With 4 but nowhere 3, "after treatment" would mean that nobody's tumour enhances.
    fitting = [name for name in fitting if name != "brats2024" or 3.0 in seen or 4.0 not in seen]
    readings = {tuple(CONVENTIONS[name][int(value)] for value in sorted(seen)) for name in fitting}
    if len(readings) == 1:
        return Convention(name=fitting[0], reason=f"the values are {_shown(seen)}, which can be read in one way only")
    raise DataError(f"the label values {_shown(seen)} alone don't say what they mean: "
                    f"{'; '.join(_meaning(name, seen) for name in fitting) or 'no convention has all of them'}. "
                    f"{_ask(fitting)}", code="label-convention")


_WORDS = ((0, r"background|cavity"), (2, r"o?edema|hyperintensit|snfh"), (1, r"non.?enhanc|necro|\bnet|\bncr|\bnetc"),
          (4, r"enhanc|\bet\b"))


def _from_description(described: Mapping[int, str]) -> str:
    meaning: dict[int, int] = {}
    for value, text in described.items():
        kind = next((kind for kind, words in _WORDS if re.search(words, text.lower())), None)
        if value == 0:
            kind = 0
        if kind is None:
            raise DataError(f"dataset.json calls label {value} {text!r}, which isn't understood. {_ask(CONVENTIONS)}",
                            code="label-convention")
        meaning[value] = kind
    for name, known in CONVENTIONS.items():
        if {**meaning, 0: 0} == dict(known):
            return name
    raise DataError(f"dataset.json describes the labels {dict(described)}, which is no known convention. "
                    f"{_ask(CONVENTIONS)}", code="label-convention")


def _fitting(values: Collection[float]) -> list[str]:
    return [name for name, table in CONVENTIONS.items() if all(value in table for value in values)]


def _meaning(name: str, seen: Collection[float]) -> str:
    words = {0: "no tumour", 1: "core", 2: "oedema", 4: "enhancing"}
    return f"{name!r} reads " + ", ".join(f"{value:g} {words[CONVENTIONS[name][int(value)]]}" for value in sorted(seen))


def _say(names: Collection[str]) -> str:
    return f"label_convention={' or '.join(map(repr, names))} (--label-convention on the command line)"


def _ask(names: Collection[str]) -> str:
    return f"Find out which one they follow and say {_say(names or CONVENTIONS)}"


def _shown(values: Collection[float]) -> str:
    few = sorted(values)[:9]
    return ", ".join(f"{value:g}" for value in few) + (", …" if len(values) > 9 else "")
