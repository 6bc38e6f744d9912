"""Engines side by side: time to the first gradient, seconds a round, peak memory, bytes on the wire, final weights.

    .venv/bin/python benchmarks/engines.py [--sites 2 8 13] [--engines Local Processes …] [--rounds 6] [--overhead]

The same trainer on the same generated patients, each arm in a process of its own, one torch thread a process. Arms that
are done are kept in a folder and not run again. Flower gets an environment of its own in that folder, which sees the
packages of this one.

- first gradient: from the call until the first site has one, with everything imported and the patients at hand.
- a round: median of the rounds after the first.
- peak memory: largest sum of the proportional set sizes (PSS) of all processes of the arm, four times a second; it
  includes a Python with torch and MONAI imported.
- on the wire: what went over the arm's own loopback interface, headers included, a round and a site; None where this
  system doesn't let a program have its own (Linux, as root). Shared memory is no wire.

Writes `benchmarks/results/engines.{json,csv}`; --overhead only the overhead of a round on `Local` over bare PyTorch, of
which `engines_overhead.py` says how, and leaves the rest of the file as it is, with the machine of that part beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from common import RESULTS, machine, write

HERE = Path(__file__).resolve().parent
ENGINES = ("Local", "Processes", "NVFlare simulation", "NVFlare mTLS", "Flower simulation")
FLOWER = "flwr[simulation]==1.41.0"
#: Seconds that an arm may take.
PATIENCE = 1800
TRIES = 3
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
        self._others: set[str] = set()  # their environment never changes, and looking at it takes time

    def run(self) -> None:
        while not self._ended.wait(0.25):
            sizes = [_pss(process) for process in self._ours()]
            self.peak, self.processes = max(self.peak, sum(sizes)), max(self.processes, len(sizes))

    def _ours(self) -> Iterator[Path]:
        for process in Path("/proc").glob("[0-9]*"):
            if process.name in self._others:
                continue
            with suppress(OSError):
                if self.mark in (process / "environ").read_bytes():
                    yield process
                else:
                    self._others.add(process.name)

    def end(self) -> None:
        """Stops watching, and ends what the arm has left behind."""
        self._ended.set()
        self.join()
        for process in self._ours():
            with suppress(ProcessLookupError):
                os.kill(int(process.name), signal.SIGKILL)


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


def command_of(arm: Arm, folder: Path, out: Path) -> list[str]:
    """What runs the arm; its loopback counters come to lie beside `out`."""
    if arm.engine == "Flower simulation":
        command = [str(flower_environment(folder)), str(HERE / "engines_flower.py")]
    else:
        command = [sys.executable, str(HERE / "engines_arm.py"), arm.engine]
    command += [str(folder / f"sites-{arm.sites}"), str(arm.rounds), str(out)]
    if own_network():
        # The counters of its loopback interface, once it is done; nobody else's traffic is on it.
        command = ["unshare", "--net", "sh", "-c", 'ip link set lo up && "$@"; code=$?; cat /proc/net/dev > "$0"; '
                   "exit $code", str(out.with_suffix(".wire")), *command]
    return command


def measure(arm: Arm, folder: Path) -> dict[str, Any]:
    """Runs one arm in a process of its own and adds what is to be seen of it from outside."""
    kept, out = folder / f"{arm.name}.json", folder / f"{arm.name}.part"
    stamp, log, wire = (out.with_suffix(suffix) for suffix in (".stamp", ".log", ".wire"))
    for old in (stamp, wire, out):
        old.unlink(missing_ok=True)
    mark = f"{arm.name}-{os.getpid()}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FEDLAB_FIRST_GRADIENT": str(stamp), MARK: mark,
                   "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]), "FLWR_TELEMETRY_ENABLED": "0",
                   "RAY_USAGE_STATS_ENABLED": "0"}
    memory, started = Memory(f"{MARK}={mark}"), time.monotonic()
    memory.start()
    try:
        with log.open("wb") as file:
            subprocess.run(command_of(arm, folder, out), stdout=file, stderr=subprocess.STDOUT, env=environment,
                           check=True, timeout=PATIENCE)
    except subprocess.SubprocessError as error:
        raise RuntimeError(f"{arm} failed ({error}); see {log}") from error
    finally:
        seconds = time.monotonic() - started
        memory.end()
    row: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    sent = loopback_bytes(wire) if wire.is_file() else None
    row |= {"peak_pss_mb": memory.peak / 1e6, "processes": memory.processes, "process_s": seconds,
            "wire_mb_round_site": None if sent is None else sent / 1e6 / arm.rounds / arm.sites}
    kept.write_text(json.dumps(row), encoding="utf-8")
    out.unlink()
    return row


def tried(arm: Arm, folder: Path) -> dict[str, Any]:
    """`measure`, again where it failed: on a busy machine Ray and NVFLARE sometimes miss their own time limits."""
    for _ in range(TRIES - 1):
        with suppress(RuntimeError):
            return measure(arm, folder)
        print(f"{arm.engine} failed, once more …", flush=True)
    return measure(arm, folder)


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


def table_of(arms: Sequence[Arm], folder: Path) -> pd.DataFrame:
    """One row an arm; those that are done are read."""
    from engines_task import make_data

    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for arm in arms:
        kept = folder / f"{arm.name}.json"
        make_data(folder / f"sites-{arm.sites}", arm.sites)
        if not kept.is_file():
            print(f"{arm.engine}, {arm.sites} sites …", flush=True)
        row = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else tried(arm, folder)
        rows.append(row)
    table = pd.DataFrame(rows)
    local = {arm.sites: row["weights_sha256"] for arm, row in zip(arms, rows, strict=True) if arm.engine == "Local"}
    table["as Local"] = [None if row["sites"] not in local else row["weights_sha256"] == local[row["sites"]]
                         for row in rows]
    table["weights_sha256"] = table["weights_sha256"].str[:16]
    return table


def measure_overhead(folder: Path, *, sites: int = 2, pairs: int = 8) -> None:
    """Measures in a process of its own and writes the part of the results."""
    from engines_task import make_data

    folder.mkdir(parents=True, exist_ok=True)
    make_data(folder / f"sites-{sites}", sites)
    done = subprocess.run([sys.executable, str(HERE / "engines_overhead.py"), str(folder / f"sites-{sites}"),
                           str(pairs)], check=True, stdout=subprocess.PIPE, text=True)
    part = {**json.loads(done.stdout.splitlines()[-1]), "machine": machine()}
    file = RESULTS / "engines.json"
    known = json.loads(file.read_text(encoding="utf-8"))
    known["result"]["overhead of a round on Local over bare PyTorch"] = part
    file.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(part, indent=1, ensure_ascii=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, nargs="+", default=[2, 8, 13])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--rounds", type=int, default=6, help="of each arm, at least 2")
    parser.add_argument("--folder", type=Path, default=Path("runs/engines"), help="rows, kept for the next time")
    parser.add_argument("--overhead", action="store_true", help="only the overhead of a round over bare PyTorch")
    options = parser.parse_args()
    if options.overhead:
        measure_overhead(options.folder.resolve())
        return
    arms = [Arm(engine=engine, sites=count, rounds=options.rounds) for count in options.sites
            for engine in ENGINES if engine in options.engines]
    table = table_of(arms, options.folder.resolve())
    print(table.round(3).to_string())
    if set(options.engines) != set(ENGINES) or options.sites != [2, 8, 13]:
        print("nothing written: not all arms were asked for")
        return
    table.round(4).to_csv(RESULTS / "engines.csv", index=False)
    known = json.loads((RESULTS / "engines.json").read_text(encoding="utf-8"))["result"]
    kept = {name: part for name, part in known.items() if name.startswith("overhead")}
    write("engines", {**kept, "rounds": options.rounds, "nvflare": version("nvflare"),
                      "flower": FLOWER.partition("==")[2], "arms": table.round(4).to_dict("records")})


if __name__ == "__main__":
    main()
