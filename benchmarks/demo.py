"""The demo on several seeds: the figures and the picture of the README.

    .venv/bin/python benchmarks/demo.py [--seeds 0 1 2 3 4] [--real DIR] [--out FOLDER] [-- DEMO-OPTIONS]

Every seed is a whole `fedlab demo` in a process of its own with a cold cache; a seed whose run in FOLDER is complete is
not repeated. Writes benchmarks/results/demo.json and demo.png and the section of README.md between its two marks. A
test notices when generator, start, settings or README are newer than the results. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from common import RESULTS, fill, machine, write
from fedlab.apps.comparison import Job, arms_of
from fedlab.apps.comparison_data import Phantoms
from fedlab.core.weights import weights_sha256
from fedlab.data.phantom.generator import GENERATOR
from fedlab.evidence.differences import difference, differences, mean_dice
from fedlab.view.colours import arm_label

README = Path(__file__).parents[1] / "README.md"
MARKS = "<!-- made by benchmarks/demo.py -->", "<!-- end of what benchmarks/demo.py made -->"
#: Patients in the README's picture.
ROWS = 4
#: Arms in the order of the tables, and their names there.
ARMS = {name: arm_label(name) for name in ("public", "federated", "pooled", "local_own", "local_others")}


def settings() -> dict[str, Any]:
    """What the results depend on; equal to what they were made with, or the results are out of date."""
    job = Job(source=Phantoms())
    trainer = arms_of(job, Path())["federated"].trainer
    return {"generator": GENERATOR, "start": weights_sha256(trainer.initial()), "trainer": repr(trainer),
            **{name: value for name, value in json.loads(json.dumps(asdict(job))).items()
               if name not in ("epsilon", "delta", "clip")}}  # of an arm that is not compared here


def run(seed: int, real: str | None, out: Path, options: Sequence[str]) -> Path:
    """The run directory of one demo, complete."""
    folder = out / f"seed-{seed}"
    if not (folder / "summary.json").is_file():
        with tempfile.TemporaryDirectory() as cache:
            begin = ["demo", "--seed", str(seed), "--out", str(folder), *options,
                     *(["--real", real] if real else [])]
            command = ["resume", str(folder)] if (folder / "job.json").is_file() else begin
            done = subprocess.run([sys.executable, "-m", "fedlab.apps.cli", *command], check=True, text=True,
                                  stdout=subprocess.PIPE, env={**os.environ, "FEDLAB_CACHE": cache})
        (folder / "printed.txt").write_text(done.stdout, encoding="utf-8")
    return folder


def as_row(one: Any) -> list[float]:
    """A difference with its interval."""
    return [round(value, 4) for value in (one.value, one.low, one.high)]


def results_of(folders: dict[int, Path]) -> dict[str, Any]:
    """Dice and differences of each seed, and of all seeds together."""
    tables = {seed: pd.read_csv(folder / "scores.csv", dtype={"site": str}).assign(seed=seed)
              for seed, folder in folders.items()}
    found = {seed: json.loads((folder / "summary.json").read_text(encoding="utf-8"))
             for seed, folder in folders.items()}
    both = pd.concat(tables.values(), ignore_index=True)
    means = {arm: mean_dice(both, arm) for arm in ARMS}
    return {
        "seeds": {str(seed): {
            "dice": one["dice"], "differences": {rule: {arm: as_row(d) for arm, d in differences(
                tables[seed], "federated", empty=rule).items()} for rule in ("brats", "skip")},
            "seconds": one["seconds"], "weights_sha256": one["weights_sha256"],
            **({"real": one["real"]} if "real" in one else {})} for seed, one in found.items()},
        "together": {
            "patients": int(both[["seed", "site", "patient"]].drop_duplicates().shape[0]),
            "dice": {arm: [round(v, 4) for v in mean] for arm, mean in means.items()},
            "federated / pooled": round(means["federated"][0] / means["pooled"][0], 4),
            "differences": {rule: {arm: as_row(difference(both, "federated", arm, empty=rule))
                                   for arm in ARMS if arm != "federated"} for rule in ("brats", "skip")}}}


def section(result: dict[str, Any], printed: str, of: dict[str, str]) -> str:
    """The README's section: what one run printed, and the seeds together."""
    lines = re.sub(r"\n+report: .*", "", printed.split("\n", 1)[1]).strip("\n").split("\n")
    shown = "\n".join(map(fill, lines))
    together, seeds = result["together"], list(result["seeds"])
    windows = json.loads((RESULTS / "windows.json").read_text(encoding="utf-8"))["result"]
    (small,) = (row for row in windows["rows"] if row["window"] == windows["crop"])
    in_windows = "{:+.3f} ({:+.3f} to {:+.3f})".format(*small["federated minus public"])
    rows = []
    for arm, name in ARMS.items():
        dice = "{:.3f} ({:.3f} to {:.3f})".format(*together["dice"][arm])
        gain = ["–" if arm == "federated" else "{:+.3f} ({:+.3f} to {:+.3f})".format(
            *together["differences"][rule][arm]) for rule in ("brats", "skip")]
        rows.append(f"| {' | '.join([name, dice, *gain])} |")
    return f"""{MARKS[0]}

`fedlab demo --seed {seeds[0]}` on {of["cores"]} cores of {of["processor"]} (AMX: {of["bf16 tiles (AMX)"]}):

```
{shown}
```

Seeds {seeds[0]} to {seeds[-1]}, each with hospitals and patients of its own, {together["patients"]} held-out patients \
in all; mean Dice of WT, TC and ET
with 95 % intervals, paired over patients. "Skip" leaves out patients without the region.

| arm | mean Dice | federated minus it | the same, "skip" |
| --- | --- | --- | --- |
{chr(10).join(rows)}

Federated reaches {together["federated / pooled"]:.3f} of the Dice of pooled training. Networks learn from crops but \
predict whole scans at once,
which costs the public model most: in windows as large as the crops, federated minus public is {in_windows}
on {small["patients"]} patients of seeds {", ".join(map(str, windows["seeds"]))}; see [how scans are \
predicted](docs/workflows.md#how-scans-are-predicted).

{MARKS[1]}"""


def shortened(picture: Image.Image, *, rows: int) -> Image.Image:
    """The figure of tumours without its last patients, so that the README's picture is no taller than a screen."""
    ink = (np.asarray(picture.convert("L")) < 250).any(axis=1)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], ink, [False]])))
    scans = [(top, bottom) for top, bottom in edges.reshape(-1, 2).tolist() if bottom - top > 0.08 * picture.width]
    cut, legend = scans[rows - 1][1], scans[-1][1]
    found = Image.new("RGB", (picture.width, cut + picture.height - legend), "white")
    found.paste(picture.crop((0, 0, picture.width, cut)))
    found.paste(picture.crop((0, legend, picture.width, picture.height)), (0, cut))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--real", metavar="DIR", help="a BraTS folder to try the federated models on")
    parser.add_argument("--out", type=Path, help="folder of the runs, to continue an interrupted benchmark")
    parser.add_argument("options", nargs="*", help="further options of fedlab demo, such as --rounds 64; then "
                                                   "the results are printed only, and the README is left as it is")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        out = options.out or Path(scratch)
        folders = {seed: run(seed, options.real, out, options.options) for seed in options.seeds}
        result = {"settings": settings(), **results_of(folders)}
        if options.options:
            print(json.dumps(result, indent=1))
            return
        write("demo", result)
        first = folders[options.seeds[0]]
        with Image.open(first / "figures" / "tumours.png") as picture:
            shortened(picture.convert("RGB"), rows=ROWS).save(RESULTS / "demo.png", optimize=True)
        text = README.read_text(encoding="utf-8")
        begin, end = text.index(MARKS[0]), text.index(MARKS[1]) + len(MARKS[1])
        made = section(result, (first / "printed.txt").read_text(encoding="utf-8"), machine())
        README.write_text(text[:begin] + made + text[end:], encoding="utf-8")


if __name__ == "__main__":
    main()
