"""What canaries show of each technique in one round, beside the ε that it claims.

    .venv/bin/python benchmarks/audits.py [--canaries 1000] [--seeds 3] [--folder runs/audits]

A lower bound of ε with 95 % confidence per technique and seed (`fedlab.evidence.CanaryAudit`), on a small linear
network; two minutes on two cores. What is done is kept in the folder, so an interrupted benchmark goes on. Writes
`benchmarks/results/audits.json` and the last two columns of the techniques' table in `docs/privacy.md`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fedlab as fl
from common import RESULTS, sweep, write

PAGE = RESULTS.parents[1] / "docs" / "privacy.md"
#: Below 1 over the number of canaries, as a guarantee for one of so many sites or patients needs.
DELTA = 5e-4
#: Every patient takes part in the step of DP-SGD: where they are sampled, audits in one run show next to nothing.
TECHNIQUES: tuple[fl.Privacy, ...] = (
    fl.DPSGD(clip=1.0, noise_multiplier=1.0, sample_rate=1.0, delta=DELTA),
    fl.privacy.LocalGaussian(clip=1.0, noise_multiplier=2.0, delta=DELTA),
    fl.privacy.CentralGaussian(clip=1.0, noise_multiplier=1.0, delta=DELTA),
    fl.privacy.SparseVector(fraction=0.1, epsilon=4.0, delta=DELTA),
    fl.privacy.SVT(fraction=0.1, epsilon_threshold=1.0, epsilon_release=1.0, delta=DELTA),
    fl.privacy.PartialSharing(fraction=0.1), fl.privacy.SharePercentile(keep=0.1, bound=1.0),
    fl.privacy.TopK(keep=0.1), fl.privacy.ScaledSign(), fl.privacy.Quantise(bits=4),
)


def audited(technique: fl.Privacy, seed: int, canaries: int) -> dict[str, Any]:
    """Claim and lower bound of one technique, as plain values."""
    audit = fl.evidence.CanaryAudit(canaries=canaries, delta=DELTA, seed=seed)(technique)
    claimed = None if audit.claimed is None else audit.claimed._asdict()
    return {"technique": type(technique).__name__, "code": repr(technique), "seed": seed, "claimed": claimed,
            "shown": audit.finding.low, "most": audit.most, "canaries": audit.finding.trials,
            "refuted": audit.refuted}


def cells(rows: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """The claim of a technique with its terms, and the bounds that its audits have shown."""
    claimed, shown = rows[0]["claimed"], [f"{row['shown']:.1f}" for row in sorted(rows, key=lambda row: row["shown"])]
    bounds = f"at least {' to '.join(dict.fromkeys([shown[0], shown[-1]]))}"
    if claimed is not None:
        return str(fl.core.Spent(**claimed)._replace(repeats=False)), bounds
    limit = ", all that so many canaries can show" if all(row["shown"] == row["most"] for row in rows) else ""
    return "none", f"{bounds} at δ = {DELTA:g} per site (any two updates of a site){limit}"


def filled(page: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The page with claim and bounds in the rows of the techniques' table that name an audited technique."""
    for name in dict.fromkeys(row["technique"] for row in rows):
        claim, shown = cells([row for row in rows if row["technique"] == name])
        page = re.sub(rf"(?m)^(\| [^|]*`(?:privacy\.)?{name}`[^|]*\|[^|]*\|[^|]*\|)[^|\n]*\|[^|\n]*\|$",
                      lambda found, end=f" {claim} | {shown} |": found[1] + end, page)
    return page


class Audited:
    """An audit that prints as the code that makes it, as `sweep` needs it."""

    def __init__(self, technique: fl.Privacy, canaries: int) -> None:
        self.technique, self.canaries = technique, canaries

    def __repr__(self) -> str:
        return f"CanaryAudit(canaries={self.canaries}, delta={DELTA})({self.technique!r})"


def score(arm: Audited, seed: int) -> dict[str, Any]:
    return audited(arm.technique, seed, arm.canaries)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--canaries", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("runs/audits"), help="kept for the next time")
    options = parser.parse_args()
    jobs = [(Audited(technique, options.canaries), seed) for technique in TECHNIQUES for seed in range(options.seeds)]
    rows = sweep(score, jobs, options.folder, "audits").to_dict("records")
    write("audits", {"rows": rows})
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")


if __name__ == "__main__":
    main()
