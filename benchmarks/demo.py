"""The demo on several seeds: the figures that the README shows.

    .venv/bin/python benchmarks/demo.py --seeds 0 1 2 [--real DIR]

Every seed is a whole `fedlab demo` in a process of its own with a cold cache. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean

from common import write


def run(seed: int, real: str | None) -> dict:
    """The summary of one demo."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "run"
        command = [sys.executable, "-m", "fedlab.apps.cli", "demo", "--seed", str(seed), "--out", str(out)]
        subprocess.run(command + (["--real", real] if real else []), check=True,
                       env={**os.environ, "FEDLAB_CACHE": str(Path(scratch) / "cache")})
        return json.loads((out / "summary.json").read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--real", metavar="DIR", help="a BraTS folder to try the federated models on")
    options = parser.parse_args()
    found = [run(seed, options.real) for seed in options.seeds]
    fed = [f["dice"]["federated"] for f in found]
    result = {
        "seeds": {str(seed): {k: f[k] for k in ("dice", "thresholding", "seconds", "weights_sha256", "real") if k in f}
                  for seed, f in zip(options.seeds, found, strict=True)},
        "mean over seeds": {
            "federated WT": round(mean(d["WT"] for d in fed), 3),
            "federated mean": round(mean(d["mean"] for d in fed), 3),
            "federated / pooled": round(mean(d["mean"] for d in fed)
                                             / mean(f["dice"]["pooled"]["mean"] for f in found), 3),
            "federated - local models elsewhere": round(mean(f["dice"]["federated"]["mean"]
                                                             - f["dice"]["local_others"]["mean"] for f in found), 3),
            **({"WT on real patients": round(mean(f["real"]["dice"]["WT"] for f in found), 3)} if options.real else {}),
        },
    }
    write("demo", result)


if __name__ == "__main__":
    main()
