"""From tissues to MR images: relaxation times, pulse sequences, contrast agent, coil, slice thickness and noise.

Every image is a sum over tissues of its fraction in the voxel times one number, the signal of that tissue by the
equation of the pulse sequence (Bernstein, King and Zhou, Handbook of MRI Pulse Sequences, 2004; Brown et al.,
Magnetic Resonance Imaging, 2014).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import numpy as np
import torch

from fedlab.core.files import packaged_toml
from fedlab.data.phantom.anatomy import smooth_fields

__all__ = ["TISSUES", "GradientEcho", "InversionRecovery", "Look", "Relaxation", "Scanner", "Sequence", "SpinEcho",
           "acquire", "draw_scanners", "draw_tissues", "enhance"]


class Relaxation(NamedTuple):
    """A tissue: proton density relative to water, T1 and T2 [ms]."""

    pd: float
    t1: float
    t2: float

    def towards(self, other: Relaxation, share: float) -> Relaxation:
        """The tissue `share` of the way to another."""
        return Relaxation(*(a + share * (b - a) for a, b in zip(self, other, strict=True)))


#: Tissue -> relaxation at 1.5 T and at 3 T; the sources are in the file.
TISSUES: Mapping[str, tuple[Relaxation, Relaxation]] = {
    name: (Relaxation(*low), Relaxation(*high))
    for name, (low, high) in packaged_toml(__package__, "tissues.toml").items()}
# Variation of T1 and T2 between patients where it is not 8 %. With a larger one, FLAIR would not suppress fluid.
_SPREAD = {"csf": 0.02, "solid": 0.15, "enhancing": 0.15, "necrosis": 0.15, "cyst": 0.15, "oedema_fluid": 0.15}
#: Relaxivities of a gadolinium chelate in plasma at 37 °C [1/(mM s)] at 1.5 T and 3 T: between those of gadobutrol
#: and of weaker chelates (Rohrer et al. 2005; Szomolanyi et al. 2019).
R1, R2 = (4.6, 4.5), (5.4, 5.9)


@dataclass(frozen=True, kw_only=True)
class SpinEcho:
    """Spin echo: PD (1 - exp(-TR/T1)) exp(-TE/T2). Times in ms."""

    tr_ms: float
    te_ms: float

    def signal(self, tissue: Relaxation) -> float:
        """Signal of a tissue, relative to fully relaxed water."""
        return tissue.pd * (1 - math.exp(-self.tr_ms / tissue.t1)) * math.exp(-self.te_ms / tissue.t2)


@dataclass(frozen=True, kw_only=True)
class GradientEcho:
    """Spoiled gradient echo at an angle a: PD sin a (1 - E1) / (1 - cos a E1) exp(-TE/T2*), E1 = exp(-TR/T1).

    T2* is taken as half of T2. Times in ms, the angle in degrees.
    """

    tr_ms: float
    te_ms: float
    flip_deg: float

    def signal(self, tissue: Relaxation) -> float:
        """Signal of a tissue, relative to fully relaxed water."""
        e1 = math.exp(-self.tr_ms / tissue.t1)
        angle = math.radians(self.flip_deg)
        steady = math.sin(angle) * (1 - e1) / (1 - math.cos(angle) * e1)
        return tissue.pd * steady * math.exp(-2 * self.te_ms / tissue.t2)


@dataclass(frozen=True, kw_only=True)
class InversionRecovery:
    """Inversion recovery, magnitude: PD |1 - 2 exp(-TI/T1) + exp(-TR/T1)| exp(-TE/T2). Times in ms."""

    tr_ms: float
    te_ms: float
    ti_ms: float

    def signal(self, tissue: Relaxation) -> float:
        """Signal of a tissue, relative to fully relaxed water."""
        z = 1 - 2 * math.exp(-self.ti_ms / tissue.t1) + math.exp(-self.tr_ms / tissue.t1)
        return tissue.pd * abs(z) * math.exp(-self.te_ms / tissue.t2)


Sequence = SpinEcho | GradientEcho | InversionRecovery


@dataclass(frozen=True, kw_only=True)
class Look:
    """What a tumour's tissues are like, as far as the contrast is concerned; all but `uptake` in [0, 1].

    Attributes:
        faint: from the usual free water in oedema and solid tumour (0) to hardly more than in normal tissue (1).
        fluid: what does not enhance: solid (0), necrotic (0.5) or a cyst (1).
        mismatch: how much of it is bright on T2 and suppressed on FLAIR.
        uptake: contrast agent in enhancing tumour after a single dose [mM].
    """

    faint: float = 0.0
    fluid: float = 0.4
    mismatch: float = 0.0
    uptake: float = 0.7


@dataclass(frozen=True, kw_only=True)
class Scanner:
    """A site's scanner and protocol.

    Args:
        field_t: 1.5 or 3.0 tesla.
        flair, t1, t1c, t2: the pulse sequences.
        bias: standard deviation of the logarithm of the coil's sensitivity over the head.
        noise: standard deviation of the Rician noise relative to the signal of white matter, at most 0.06.
        slice_mm: slice thickness of FLAIR, T1, T1c and T2.
        slice_axis: 0 sagittal, 1 coronal, 2 axial, for FLAIR, T1, T1c and T2.
        dose: contrast agent relative to a single dose (0.1 mmol/kg).
        rim: share of the meninges that the site's brain extraction leaves, in [0, 1].
        scalp: share of fat of scalp and orbits in what it leaves, in [0, 1].
        coverage: share of the head that the field of view of FLAIR, T1, T1c and T2 covers along the slice axis, from
            the upper end or the right: at least 0.7; what is cut off is dark.

    Raises:
        ValueError: a value outside its range.
    """

    field_t: float = 3.0
    flair: Sequence = field(default_factory=lambda: InversionRecovery(tr_ms=9000, te_ms=120, ti_ms=2500))
    t1: Sequence = field(default_factory=lambda: SpinEcho(tr_ms=600, te_ms=10))
    t1c: Sequence = field(default_factory=lambda: SpinEcho(tr_ms=600, te_ms=10))
    t2: Sequence = field(default_factory=lambda: SpinEcho(tr_ms=4500, te_ms=95))
    bias: float = 0.08
    noise: float = 0.025
    slice_mm: tuple[float, float, float, float] = (4.0, 4.0, 1.5, 4.0)
    slice_axis: tuple[int, int, int, int] = (2, 2, 2, 2)
    dose: float = 1.0
    rim: float = 0.3
    scalp: float = 0.5
    coverage: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        if self.field_t not in (1.5, 3.0):
            raise ValueError(f"field_t must be 1.5 or 3.0 tesla, got {self.field_t}")
        for name, high in (("noise", 0.06), ("bias", 0.5), ("dose", 3.0), ("rim", 1.0), ("scalp", 1.0)):
            if not 0.0 <= getattr(self, name) <= high:
                raise ValueError(f"{name} must be between 0 and {high:g}, got {getattr(self, name)}")
        if self.dose == 0.0:
            raise ValueError("dose must be above 0: T1c is the image with contrast agent")
        if len(self.slice_mm) != 4 or not all(0.0 < s <= 10.0 for s in self.slice_mm):
            raise ValueError(f"slice_mm must be four thicknesses up to 10 mm, got {self.slice_mm}")
        if len(self.slice_axis) != 4 or not all(a in (0, 1, 2) for a in self.slice_axis):
            raise ValueError(f"slice_axis must be four of 0, 1, 2, got {self.slice_axis}")
        if len(self.coverage) != 4 or not all(0.7 <= c <= 1.0 for c in self.coverage):
            raise ValueError(f"coverage must be four shares between 0.7 and 1, got {self.coverage}")

    @property
    def sequences(self) -> tuple[Sequence, Sequence, Sequence, Sequence]:
        """In the order of `fedlab.core.types.MODALITIES`."""
        return self.flair, self.t1, self.t1c, self.t2


def draw_scanners(sites: int, rng: np.random.Generator) -> list[Scanner]:
    """Plausible scanners, one per site: fields, protocols and coils as they vary between hospitals.

    The range of each setting is divided evenly among the sites (a Latin hypercube), so that even a few sites differ in
    every setting.
    """
    from scipy.stats.qmc import LatinHypercube

    return [_scanner(*map(float, share)) for share in LatinHypercube(d=25, rng=rng).random(sites)]


def _scanner(field: float, tr: float, te: float, ti: float, kind: float, t1_tr: float, t1_te: float, t1_more: float,
             own: float, t1c_tr: float, t1c_te: float, t1c_flip: float, t2_tr: float, t2_te: float, turned: float,
             thin: float, flair_mm: float, t1_mm: float, t2_mm: float, bias: float, noise: float, dose: float,
             rim: float, scalp: float, short: float) -> Scanner:
    """A scanner from the position of each setting in its range, 0 to 1."""
    repeat = _pick(tr, 7000, 11000)
    null = 4200 * math.log(2 / (1 + math.exp(-repeat / 4200)))  # the inversion time that suppresses fluid
    t1: Sequence
    if kind < 1 / 3:
        t1 = SpinEcho(tr_ms=_pick(t1_tr, 400, 1050), te_ms=_pick(t1_te, 8, 21))  # the longest are nearly flat
    elif kind < 2 / 3:
        t1 = GradientEcho(tr_ms=_pick(t1_tr, 8, 30), te_ms=_pick(t1_te, 2, 5), flip_deg=_pick(t1_more, 14, 32))
    else:
        t1 = InversionRecovery(tr_ms=_pick(t1_tr, 1900, 2500), te_ms=_pick(t1_te, 3, 10),
                               ti_ms=_pick(t1_more, 780, 1080))
    t1c: Sequence = t1
    if own < 0.4:
        t1c = GradientEcho(tr_ms=_pick(t1c_tr, 8, 25), te_ms=_pick(t1c_te, 2, 4), flip_deg=_pick(t1c_flip, 14, 32))
    thick = _pick(t1_mm, 2.5, 6.5)
    t1c_thick = 1.0 if thin < 0.65 else thick  # without contrast agent a spin echo is rarely that thin
    return Scanner(
        field_t=1.5 if field < 0.45 else 3.0,
        flair=InversionRecovery(tr_ms=repeat, te_ms=_pick(te, 80, 150),
                                ti_ms=round(null * _pick(ti, 0.93, 1.03, 3), 1)),
        t1=t1, t1c=t1c, t2=SpinEcho(tr_ms=_pick(t2_tr, 3000, 6500), te_ms=_pick(t2_te, 72, 125)),
        bias=round(0.03 + 0.25 * bias**2.5, 3),  # a few coils vary by more than a faint tumour
        noise=round(math.exp(_pick(noise, math.log(0.01), math.log(0.035), 4)), 4),
        slice_mm=(_pick(flair_mm, 2.5, 5.5), thick if kind < 1 / 3 else t1c_thick, t1c_thick, _pick(t2_mm, 2.5, 5.5)),
        slice_axis=(1 if turned > 0.9 else 2, 0 if turned < 0.25 else 2, 2, 2),
        dose=_pick(dose, 0.7, 1.4, 2),
        rim=_pick(rim, 0.1, 0.9, 2),
        scalp=_pick(scalp, 0.0, 1.0, 2),
        coverage=(1.0, _pick(short * 10, 0.8, 0.98, 2), 1.0, 1.0) if short < 0.1 else (
            _pick(short * 10 - 1, 0.86, 0.98, 2), 1.0, 1.0, 1.0) if short < 0.2 else (1.0,) * 4,
    )


def _pick(share: float, low: float, high: float, digits: int = 1) -> float:
    """The value at a share of a range."""
    return round(low + share * (high - low), digits)


def draw_tissues(rng: np.random.Generator, field_t: float, look: Look | None = None) -> dict[str, Relaxation]:
    """One patient's tissues at a field strength, varied around `TISSUES`: density 2 %, T1 and T2 8 to 15 % (fluid 2 %).

    "oedema" lies 0.6 to 0.85 of the way from white matter to free oedema fluid, less far where the tumour is faint;
    "core" and "core_b" are two mixtures of solid non-enhancing tumour, necrosis and cyst; "lesion" is a white-matter
    hyperintensity, "scar" an old infarct. A name that ends in "_b" is the second sub-class of a tissue.
    """
    look = look or Look()
    column = 0 if field_t == 1.5 else 1
    out: dict[str, Relaxation] = {}
    for name, pair in TISSUES.items():
        wide = _SPREAD.get(name, 0.08)
        pd, t1, t2 = pair[column]
        out[name] = Relaxation(min(1.0, pd * math.exp(0.02 * rng.standard_normal())),
                               t1 * math.exp(wide * rng.standard_normal()), t2 * math.exp(wide * rng.standard_normal()))
    fluid = out["oedema_fluid"]
    wet = float(rng.uniform(0.6, 0.85)) * (1 - 0.95 * look.faint)
    out["oedema"] = out["white"].towards(fluid, wet)
    out["oedema_b"] = out["white"].towards(fluid, wet * float(rng.uniform(0.35, 0.9)))
    out["lesion"] = out["white"].towards(fluid, float(rng.uniform(0.3, 0.6)))
    out["scar"] = out["white"].towards(fluid, float(rng.uniform(0.4, 0.9)))
    # Cellular tumour contains less free water than oedema: some of it hardly differs in intensity from grey matter.
    out["solid"] = out["grey"].towards(out["solid"], float(rng.uniform(0.3, 1.0)) * (1 - 0.95 * look.faint))
    out["enhancing"] = out["grey"].towards(out["enhancing"], float(rng.uniform(0.0, 0.6)))
    for name, least, most in (("core", -0.1, 0.1), ("core_b", -0.35, 0.35)):
        share = min(1.0, max(0.0, look.fluid + float(rng.uniform(least, most)))) * 2
        mixed = out["solid"].towards(out["necrosis"], share) if share < 1 else out["necrosis"].towards(
            out["cyst"], share - 1)
        out[name] = mixed.towards(out["mismatch"], look.mismatch)
    for name in ("white", "grey", "enhancing"):
        pd, t1, t2 = out[name]
        out[f"{name}_b"] = Relaxation(pd, t1 * math.exp(rng.normal(0, 0.05)), t2 * math.exp(rng.normal(0, 0.05)))
    return out


def enhance(tissue: Relaxation, concentration_mm: float, field_t: float) -> Relaxation:
    """The tissue with contrast agent: 1/T1 and 1/T2 increase by relaxivity times concentration [mM]."""
    column = 0 if field_t == 1.5 else 1
    return Relaxation(tissue.pd, 1 / (1 / tissue.t1 + R1[column] * concentration_mm / 1000),
                      1 / (1 / tissue.t2 + R2[column] * concentration_mm / 1000))


def acquire(rng: np.random.Generator, fractions: Mapping[str, torch.Tensor], scanner: Scanner, spacing_mm: float,
            detail: torch.Tensor, look: Look | None = None) -> torch.Tensor:
    """The four images of one patient in the order of `fedlab.core.types.MODALITIES`, float32, positive, (4, X, Y, Z).

    Args:
        fractions: tissue, named as by `draw_tissues` -> fraction of each voxel, shape (X, Y, Z).
        detail: relative T1 contrast of nuclei and tracts, shape (X, Y, Z), 0 for none.
        look: of the tumour.
    """
    look = look or Look()
    tissues = draw_tissues(rng, scanner.field_t, look)
    agent = _concentrations(rng, scanner.dose, look)
    names = list(fractions)
    table = np.empty((4, len(names)), np.float32)
    for channel, sequence in enumerate(scanner.sequences):
        # Times and angle deviate by a few per cent in each run.
        run = replace(sequence, **{f.name: getattr(sequence, f.name) * math.exp(0.03 * rng.standard_normal())
                                   for f in fields(sequence)})
        seen = tissues if channel != 2 else {
            name: enhance(tissues[name], agent.get(name, agent["brain"]), scanner.field_t) for name in names}
        table[channel] = [run.signal(seen[name]) for name in names]
        table[channel] /= run.signal(tissues["white"])
    stack = torch.stack([fractions[name] for name in names])
    shape = stack.shape[1:]
    image = (torch.from_numpy(table) @ stack.flatten(1)).unflatten(1, shape)
    _unevenness(rng, image, table, names, fractions, spacing_mm)
    brain = stack.sum(0).clamp(0, 1)
    texture = smooth_fields(rng, 3, shape, spacing_mm, max(spacing_mm, 5.0))
    slow = smooth_fields(rng, 4, shape, spacing_mm, 75.0)
    strength = float(rng.uniform(0.01, 0.035))
    signs = torch.tensor([1.0, -0.6, -0.6, 1.0])
    smear = float(rng.uniform(1.5, 3.5)) / spacing_mm
    share = [0.06, 0.5, 0.4, -0.2]  # of the T1 template's own detail in each contrast
    for c in range(4):
        relative = signs[c] * texture[0] + 0.5 * texture[1 if c in (0, 3) else 2]
        image[c] *= 1 + strength * relative + share[c] * detail
        image[c] *= torch.exp(scanner.bias * (0.8 * slow[0] + 0.6 * slow[min(c + 1, 3)]))
        for axis in range(3):  # slice thickness across the slices, blur by registration within them
            across = scanner.slice_mm[c] / spacing_mm if axis == scanner.slice_axis[c] else 1.0
            image[c] = _thick(image[c], max(across, smear), axis)
    # 1 inside and about a half at the border, as after interpolation of a scan that is 0 outside the brain
    soft = torch.nn.functional.avg_pool3d((brain > 0).float()[None, None], 3, 1, 1)[0, 0]
    image *= 1 - float(rng.uniform(0, 0.9)) * (1 - soft)
    noise = torch.from_numpy(rng.standard_normal((2, *image.shape), dtype=np.float32)) * scanner.noise
    image = torch.sqrt((image + noise[0]).square() + noise[1].square())
    for c, (axis, seen_share) in enumerate(zip(scanner.slice_axis, scanner.coverage, strict=True)):
        image[c].narrow(axis, 0, round((1 - seen_share) * shape[axis])).zero_()  # outside the field of view
    return image * (brain > 0)


def _concentrations(rng: np.random.Generator, dose: float, look: Look) -> dict[str, float]:
    """One patient's contrast agent by tissue [mM]."""
    return {
        "enhancing": dose * look.uptake, "enhancing_b": dose * look.uptake * float(rng.uniform(0.3, 0.8)),
        "core": dose * float(rng.uniform(0.0, 0.04)), "core_b": dose * float(rng.uniform(0.0, 0.08)),
        "blood": dose * float(rng.uniform(0.5, 1.5)), "choroid": dose * float(rng.uniform(0.3, 0.9)),
        "meninges": dose * float(rng.uniform(0.1, 0.5)), "csf": 0.0, "fat": 0.0,
        "cavity": 0.0, "oedema": dose * float(rng.uniform(0.0, 0.02)), "brain": dose * 0.02,
    }


def _unevenness(rng: np.random.Generator, image: torch.Tensor, table: np.ndarray[tuple[int, ...], np.dtype[np.float32]],
                names: list[str], fractions: Mapping[str, torch.Tensor], spacing_mm: float) -> None:
    """Uneven oedema, patchy enhancement of the rim, and fluid not fully suppressed on FLAIR. In place."""
    field = smooth_fields(rng, 3, image.shape[1:], spacing_mm, 10.0)
    column = {name: i for i, name in enumerate(names)}
    gain = torch.from_numpy(table[:, column["oedema"]] - table[:, column["white"]])
    image += gain.view(4, 1, 1, 1) * (fractions["oedema"] * (0.12 * field[0]).clamp(-0.25, 0.25))
    # Moving fluid partly escapes the inversion: cisterns and ventricles can be bright on FLAIR.
    fluid = float(rng.uniform(0.0, 1.3)) * (0.9 * (field[1] - 0.5)).clamp(0, 1.3)
    image[0] += fractions["csf"] * fluid
    # The cortex differs between lobes on FLAIR and is brightest in the limbic system.
    image[0] *= 1 + fractions["grey"] * (float(rng.uniform(0.0, 0.15)) * field[2])
    uptake = float(table[2, column["enhancing"]]) - 1.0
    image[2] += max(uptake, 0.0) * fractions["enhancing"] * (0.25 * field[1]).clamp(-0.3, 0.6)


def _thick(image: torch.Tensor, voxels: float, axis: int) -> torch.Tensor:
    """The mean over a slice of `voxels` voxels' thickness along an axis; unchanged for slices within a voxel."""
    if voxels <= 1.0:
        return image
    half = (voxels - 1) / 2
    reach = math.ceil(half)
    weights = np.array([1.0 if abs(k) <= half else max(0.0, half + 1 - abs(k)) for k in range(-reach, reach + 1)])
    weights /= weights.sum()
    out = torch.zeros_like(image)
    size = image.shape[axis]
    for k, weight in zip(range(-reach, reach + 1), weights, strict=True):
        low, high = max(0, k), min(size, size + k)
        out.narrow(axis, low - k, high - low).add_(image.narrow(axis, low, high - low), alpha=float(weight))
    return out
