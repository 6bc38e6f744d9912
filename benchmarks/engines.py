"""Engines side by side: time to the first gradient, seconds a round, peak memory, bytes on the wire, final weights.

    .venv/bin/python benchmarks/engines.py [--sites 2 8 13] [--engines Local Processes …] [--rounds 6]

The same trainer on the same generated patients, each arm in a process of its own, one torch thread a process. Arms that
are done are kept in a folder and not run again. Flower gets an environment of its own in that folder, which sees the
packages of this one; NVFLARE's arms run with the interpreter that is named, where NVFLARE is installed.

- first gradient: from the call until the first site has one, with everything imported and the patients at hand.
- a round: median of the rounds after the first.
- peak memory: largest sum of the proportional set sizes (PSS) of all processes of the arm, ten times a second, above
  nothing: a plain Python with torch and MONAI imported is in it.
- on the wire: what went over the arm's own loopback interface, headers included, a round and a site; None where this
  system doesn't let a program have its own (Linux, as root). Shared memory is no wire.

Writes `benchmarks/results/engines.{json,csv}`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from common import RESULTS, write

HERE = Path(__file__).resolve().parent
ENGINES = ("Local", "Processes", "NVFlare simulation", "NVFlare mTLS", "Flower simulation")
FLOWER = "flwr[simulation]==1.41.0"
#: By which the processes of an arm are known, however they were started.
MARK = "FEDLAB_BENCHMARK_ARM"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """An engine and a number of sites."""

    engine: str
    sites: int
    rounds: int

    @property
    def name(self) -> str:
        return f"{self.engine.replace(' ', '-')}-{self.sites}-{self.rounds}"


class Memory(threading.Thread):
    """Watches the memory of all processes of an arm."""

    def __init__(self, mark: str) -> None:
        super().__init__(daemon=True)
        self.mark, self.peak, self.processes, self._ended = mark.encode(), 0, 0, threading.Event()

    def run(self) -> None:
        while not self._ended.wait(0.1):
            sizes = [_pss(process) for process in self._ours()]
            self.peak, self.processes = max(self.peak, sum(sizes)), max(self.processes, len(sizes))

    def _ours(self) -> Iterator[Path]:
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if self.mark in (process / "environ").read_bytes():
                    yield process

    def end(self) -> None:
        self._ended.set()
        self.join()


def _pss(process: Path) -> int:
    with suppress(OSError):
        for line in (process / "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def flower_environment(folder: Path) -> Path:
    """The interpreter of an environment with Flower that sees this one's packages; made if it isn't there."""
    home = folder / "flower-env"
    python = home / "bin" / "python"
    if not (home / "ready").is_file():
        shutil.rmtree(home, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        packages = [path for path in sys.path if path.endswith("site-packages")]
        own = next(home.glob("lib/python*/site-packages"))
        (own / "fedlab-main.pth").write_text("\n".join([*packages, str(HERE.parent)]), encoding="utf-8")
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", FLOWER], check=True)
        (home / "ready").touch()
    return python


def measure(arm: Arm, folder: Path, flare: Path) -> dict[str, Any]:
    """Runs one arm in a process of its own and adds what is to be seen of it from outside."""
    data, out = folder / f"sites-{arm.sites}", folder / f"{arm.name}.json"
    stamp, log = folder / f"{arm.name}.stamp", folder / f"{arm.name}.log"
    stamp.unlink(missing_ok=True)
    if arm.engine == "Flower simulation":
        command = [str(flower_environment(folder)), str(HERE / "engines_flower.py")]
    else:
        python = str(flare) if arm.engine.startswith("NVFlare") else sys.executable
        command = [python, str(HERE / "engines_arm.py"), arm.engine]
    scratch = folder / f"{arm.name}.part"
    command += [str(data), str(arm.rounds), str(scratch)]
    wire = folder / f"{arm.name}.wire"
    if own_network():
        # The counters of its loopback interface, once it is done; nobody else's traffic is on it.
        command = ["unshare", "--net", "sh", "-c", 'ip link set lo up && "$@"; code=$?; cat /proc/net/dev > "$0"; '
                   "exit $code", str(wire), *command]
    mark = f"{MARK}={arm.name}-{os.getpid()}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FEDLAB_FIRST_GRADIENT": str(stamp), "RAY_DEDUP_LOGS": "0",
                   "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]), "FLWR_TELEMETRY_ENABLED": "0",
                   MARK: mark.partition("=")[2], "RAY_USAGE_STATS_ENABLED": "0"}
    memory = Memory(mark)
    memory.start()
    started = time.monotonic()
    with log.open("wb") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False)
    seconds = time.monotonic() - started
    memory.end()
    if done.returncode or not scratch.is_file():
        raise RuntimeError(f"{arm} ended with code {done.returncode}; see {log}")
    row: dict[str, Any] = json.loads(scratch.read_text(encoding="utf-8"))
    sent = loopback_bytes(wire) if wire.is_file() else None
    row |= {"peak_pss_mb": memory.peak / 1e6, "processes": memory.processes, "process_s": seconds,
            "wire_mb_round_site": None if sent is None else sent / 1e6 / arm.rounds / arm.sites}
    out.write_text(json.dumps(row), encoding="utf-8")
    scratch.unlink()
    return row


def own_network() -> bool:
    """Whether programs can be given a loopback interface of their own."""
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        return False
    return subprocess.run(["unshare", "--net", "ip", "link", "set", "lo", "up"], capture_output=True,
                          check=False).returncode == 0


def loopback_bytes(counters: Path) -> int:
    """Bytes that the loopback interface has sent."""
    line = next(line for line in counters.read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def table_of(arms: Sequence[Arm], folder: Path, flare: Path) -> pd.DataFrame:
    """One row an arm; those that are done are read."""
    from engines_task import make_data

    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for arm in arms:
        kept = folder / f"{arm.name}.json"
        make_data(folder / f"sites-{arm.sites}", arm.sites)
        if not kept.is_file():
            print(f"{arm.engine}, {arm.sites} sites …", flush=True)
        row = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else measure(arm, folder, flare)
        rows.append(row)
    table = pd.DataFrame(rows)
    local = {arm.sites: row["weights_sha256"] for arm, row in zip(arms, rows, strict=True) if arm.engine == "Local"}
    table["as Local"] = [None if row["sites"] not in local else row["weights_sha256"] == local[row["sites"]]
                         for row in rows]
    table["weights_sha256"] = table["weights_sha256"].str[:16]
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, nargs="+", default=[2, 8, 13])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--rounds", type=int, default=6, help="of each arm, at least 2")
    parser.add_argument("--folder", type=Path, default=Path("runs/engines"), help="rows, kept for the next time")
    parser.add_argument("--flare", type=Path, default=Path(".venv-flare/bin/python"),
                        help="interpreter of an environment with NVFLARE and fedlab")
    options = parser.parse_args()
    arms = [Arm(engine=engine, sites=count, rounds=options.rounds) for count in options.sites
            for engine in ENGINES if engine in options.engines]
    table = table_of(arms, options.folder.resolve(), options.flare.absolute())
    print(table.round(3).to_string())
    if set(options.engines) != set(ENGINES) or options.sites != [2, 8, 13]:
        print("nothing written: not all arms were asked for")
        return
    table.round(4).to_csv(RESULTS / "engines.csv", index=False)
    write("engines", {"rounds": options.rounds, "arms": table.to_dict("records")})


if __name__ == "__main__":
    main()
