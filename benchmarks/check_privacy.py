"""`check_privacy` tried: how many of the known mistakes it finds, how often it refuses a right technique, its time.

    .venv/bin/python benchmarks/check_privacy.py [--settings 50] [--kept FOLDER] [--only right|wrong|settings]

Known mistakes and right techniques are those of tests/checks/mistakes.py. Fedlab's own techniques are drawn with random
settings. What an interrupted run has found is kept in a folder; checks that are there are not made again.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from common import write
from fedlab.checks.check_report import CheckReport
from fedlab.checks.privacy import check_privacy
from fedlab.checks.small_runs import noise_site, small_trainer
from fedlab.privacy.at_sites import AtSites
from fedlab.privacy.compression import Quantise, ScaledSign, TopK
from fedlab.privacy.dp.clipping import AdaptiveClip
from fedlab.privacy.dp.dpsgd import DPSGD
from fedlab.privacy.dp.site_level import CentralGaussian, LocalGaussian
from fedlab.privacy.personal_layers import PersonalLayers
from fedlab.privacy.secure_aggregation.secure_sum import SecureAggregation
from fedlab.privacy.sparse.partial_sharing import SVT, SparseVector

sys.path[:0] = [str(Path(__file__).parents[1] / "tests" / part) for part in ("checks", "")]

#: Processor seconds that one check of a usual technique may take.
ALLOWED = 20.0


def network(rng: random.Random) -> torch.nn.Module:
    """A network of 20 to some thousand weights, with tensors of as few entries as one."""
    width = rng.choice([1, 2, 3, 8, 24])
    torch.manual_seed(rng.randrange(2**31))
    return torch.nn.Sequential(torch.nn.Conv3d(4, width, rng.choice([1, 3]), padding="same"),
                               torch.nn.GroupNorm(1, width), torch.nn.ReLU(), torch.nn.Conv3d(width, 3, 1))


def log(rng: random.Random, low: float, high: float) -> float:
    """A number between two, its logarithm uniform."""
    return float(f"{low * (high / low) ** rng.random():.3g}")


def local(rng: random.Random) -> LocalGaussian:
    return LocalGaussian(clip=log(rng, 1e-3, 30), noise_multiplier=log(rng, 0.5, 20), delta=1e-3,
                         per_layer=rng.random() < 0.5, accountant=rng.choice(["rdp", "gdp"]),
                         secure_mode=rng.random() < 0.2)


def central(rng: random.Random) -> CentralGaussian:
    noise, start = log(rng, 0.5, 8), log(rng, 1e-2, 10)
    adaptive = rng.random() < 0.4
    clip = AdaptiveClip(start=start, bit_noise=noise * log(rng, 0.6, 4), quantile=rng.choice([0.3, 0.5, 0.8])
                        ) if adaptive else start
    return CentralGaussian(clip=clip, noise_multiplier=noise, delta=1e-3, per_layer=not adaptive and rng.random() < 0.5,
                           secure_mode=rng.random() < 0.1)


def dpsgd(rng: random.Random) -> DPSGD:
    noise, start = log(rng, 0.5, 4), log(rng, 1e-2, 5)
    adaptive = rng.random() < 0.3
    clip = AdaptiveClip(start=start, bit_noise=noise * log(rng, 0.6, 4)) if adaptive else start
    drawn: dict[str, Any] = {"batch": rng.choice([1, 2, 3])} if rng.random() < 0.4 else {
        "sample_rate": rng.choice([0.1, 0.25, 0.5, 0.9, 1.0])}
    return DPSGD(clip=clip, noise_multiplier=noise, delta=1e-3, crops=rng.choice([1, 1, 2]),
                 per_layer=not adaptive and rng.random() < 0.4, secure_mode=rng.random() < 0.1, **drawn)


def svt(rng: random.Random) -> SVT:
    return SVT(fraction=rng.choice([0.05, 0.1, 0.4, 1.0]), epsilon_threshold=log(rng, 1e-3, 10),
               epsilon_release=log(rng, 1e-3, 10), clip=log(rng, 1e-5, 1), delta=1e-3)


def sparse_vector(rng: random.Random) -> SparseVector:
    return SparseVector(fraction=rng.choice([0.05, 0.1, 0.4, 1.0]), epsilon=log(rng, 0.1, 50), clip=log(rng, 1e-5, 1),
                        rounds=rng.choice([1, 5]), delta=1e-3)


def secure(rng: random.Random) -> SecureAggregation:
    return SecureAggregation(clip=log(rng, 0.01, 10), threshold=2, noise_multiplier=log(rng, 0.5, 5), delta=1e-3)


def at_sites(rng: random.Random) -> AtSites:
    return AtSites(sites=rng.choice([("site-0",), ("site-0", "site-1")]), technique=local(rng))


def joined(rng: random.Random) -> Any:
    compressing = rng.choice([TopK(keep=0.3, error_feedback=rng.random() < 0.5), ScaledSign(), Quantise(bits=8)])
    return rng.choice([lambda: compressing + local(rng), lambda: local(rng) + compressing,
                       lambda: PersonalLayers(names=["3.bias"]) + central(rng), lambda: dpsgd(rng) + compressing])()


KINDS: dict[str, Callable[[random.Random], Any]] = {
    "LocalGaussian": local, "CentralGaussian": central, "DPSGD": dpsgd, "SVT": svt, "SparseVector": sparse_vector,
    "SecureAggregation": secure, "AtSites": at_sites, "sums": joined}


def small(technique: Any, rng: random.Random | None = None) -> CheckReport:
    """The report on a technique, with sites and a network that the tests use or that are drawn."""
    if rng is None:
        from test_mistakes import small as as_in_the_tests

        return as_in_the_tests(technique)
    sites = [noise_site(number, rng.choice([6, 8, 10])) for number in range(3)]
    return check_privacy(technique, trainer=small_trainer(model=network(rng), steps=1, lr=1.0, batch_size=4),
                         sites=[type(site)(site.name, list(site.train)[:min(len(s.train) for s in sites)])
                                for site in sites], raise_=False)


def jobs(settings: int, only: str | None) -> Iterator[tuple[str, str, Callable[[], CheckReport]]]:
    """Group, name and check of each job."""
    import mistakes

    for group, techniques in (("right", mistakes.RIGHT), ("wrong", mistakes.WRONG)):
        for technique in techniques if only in (None, group) else []:
            yield group, repr(technique), lambda technique=technique: small(technique)
    for number in range(settings if only in (None, "settings") else 0):
        for kind in KINDS:
            rng = random.Random(f"{kind} {number}")
            technique = KINDS[kind](rng)
            yield kind, f"{number} {technique!r}", lambda technique=technique, rng=rng: small(technique, rng)


def row(check: Callable[[], CheckReport]) -> dict[str, Any]:
    started = time.process_time()
    try:
        report = check()
        failed = [f"{f.check}: {f.what[:200]}" for f in report.findings if f.outcome == "failed"]
    except ValueError as error:  # settings that are refused where they are made
        failed = [f"refused: {error}"[:200]]
    return {"failed": failed, "seconds": round(time.process_time() - started, 2)}


def summary(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    out = {}
    for group in dict.fromkeys(key.partition("|")[0] for key in found):
        rows = {key.partition("|")[2]: one for key, one in found.items() if key.startswith(f"{group}|")}
        seconds = sorted(one["seconds"] for one in rows.values())
        odd = {name: one["failed"] for name, one in rows.items() if bool(one["failed"]) != (group == "wrong")}
        out[group] = {"checks": len(rows), ("passed though wrong" if group == "wrong" else "refused though right"): odd,
                      "processor seconds": {"median": seconds[len(seconds) // 2], "largest": seconds[-1],
                                            f"above {ALLOWED:g}": sum(s > ALLOWED for s in seconds)}}
    right = [key for key in found if not key.startswith("wrong|")]
    out["all right ones"] = {"checks": len(right), "refused": sum(bool(found[key]["failed"]) for key in right)}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", type=int, default=50, help="random settings per kind of technique")
    parser.add_argument("--kept", type=Path, default=Path(tempfile.gettempdir()) / "fedlab-check-privacy")
    parser.add_argument("--only", choices=["right", "wrong", "settings"])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    options.kept.mkdir(parents=True, exist_ok=True)
    path = options.kept / "checks.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for group, name, check in jobs(options.settings, options.only):
        key = f"{group}|{name}"
        if key not in found:
            found[key] = row(check)
            path.write_text(json.dumps(found), encoding="utf-8")
            print(key[:120], found[key], flush=True)
    write("check_privacy", summary(found))


if __name__ == "__main__":
    main()
