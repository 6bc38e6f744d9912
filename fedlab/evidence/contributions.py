"""What each site has contributed to a model: leave-one-out and Shapley values, from the updates of one run.

No model is trained again: a model "without Basel" is put together from the stored updates of the others, as Song et al.
2019 (Profit allocation for federated learning, IEEE Big Data) propose. It says what a site's updates are worth in this
run; had the site not been there, the others' updates would have been different ones.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fedlab.core.errors import PrivacyError, RunError
from fedlab.core.gate import check_update
from fedlab.core.protocols import Engine, Strategy
from fedlab.core.seeds import generator
from fedlab.core.types import Answer, ServerState, Site, Tensors, Update
from fedlab.core.weights import weights_sha256
from fedlab.run.history import History
from fedlab.run.recipe import recipe_sha256
from fedlab.run.site_states import SiteStates
from fedlab.run.site_task import SiteTask
from fedlab.run.wrapped import Wrapped
from fedlab.strategies.averaging import FedAvg, TooFewUpdates

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Contributions", "KeepUpdates", "Values", "dice_on", "leave_one_out", "shapley", "site_contributions"]

#: Players up to which every coalition is asked, 2 to that power.
_EXACT = 12
_FORMAT = "fedlab-updates-1"

#: What a coalition is worth.
Worth = Callable[[frozenset[str]], float]


@dataclass(frozen=True, kw_only=True, eq=False)
class Values:
    """What each player of a game is worth.

    Attributes:
        value: by player.
        error: standard error of each value; 0 where every coalition was asked.
        evaluations: coalitions whose worth was found, each once.
    """

    value: Mapping[str, float]
    error: Mapping[str, float]
    evaluations: int


def shapley(worth: Worth, players: Sequence[str], *, permutations: int | None = None, tolerance: float = 0.0,
            seed: int = 0) -> Values:
    """The Shapley value: what each player adds, on average over the orders in which they may come.

    The values add up to worth(everybody) - worth(nobody); players who add the same to every coalition get the same;
    who adds nothing gets nothing (Shapley 1953).

    Args:
        worth: of a coalition; asked once for each.
        players: their names.
        permutations: orders that are drawn (Castro et al. 2009); None asks all 2^n coalitions.
        tolerance: an order is left as soon as those who have come are worth, to this much, what everybody is
            (truncation, Ghorbani and Zou 2019); the values then add up to this much only.
        seed: of the orders.

    Raises:
        ValueError: too many players for all coalitions, fewer than 2 permutations, or a negative tolerance.
    """
    import pandas as pd

    if permutations is None and len(players) > _EXACT:
        raise ValueError(f"{len(players)} players have 2^{len(players)} coalitions; give permutations=, such as 200")
    if permutations is not None and permutations < 2:
        raise ValueError(f"permutations is at least 2, or no error can be stated; got {permutations}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance is at least 0, got {tolerance}")
    known = _Remembered(worth)
    if permutations is None:
        value = {player: _exact(known, player, [p for p in players if p != player]) for player in players}
        return Values(value=value, error=dict.fromkeys(players, 0.0), evaluations=len(known.found))
    rng, everybody = generator(seed, "shapley"), frozenset(players)
    rows = []
    for _ in range(permutations):
        order = [players[k] for k in torch.randperm(len(players), generator=rng).tolist()]
        row, came = dict.fromkeys(players, 0.0), frozenset[str]()
        for player in order:
            if tolerance and abs(known(everybody) - known(came)) <= tolerance:
                break
            row[player] = known(came | {player}) - known(came)
            came |= {player}
        rows.append(row)
    table = pd.DataFrame(rows, columns=list(players))
    value = {player: float(table[player].mean()) for player in players}
    error = {player: float(table[player].std()) / math.sqrt(permutations) for player in players}
    return Values(value=value, error=error, evaluations=len(known.found))


def leave_one_out(worth: Worth, players: Sequence[str]) -> Values:
    """What everybody is worth more than everybody but one: n + 1 coalitions. These values add up to nothing special.

    Of two sites with the same patients each seems worthless, since the other one is still there.
    """
    known, everybody = _Remembered(worth), frozenset(players)
    value = {player: known(everybody) - known(everybody - {player}) for player in players}
    return Values(value=value, error=dict.fromkeys(players, 0.0), evaluations=len(known.found))


class _Remembered:
    """The worth of coalitions, asked once each."""

    def __init__(self, worth: Worth) -> None:
        self.worth = worth
        self.found: dict[frozenset[str], float] = {}

    def __call__(self, coalition: frozenset[str]) -> float:
        if coalition not in self.found:
            self.found[coalition] = float(self.worth(coalition))
        return self.found[coalition]


def _exact(worth: _Remembered, player: str, others: Sequence[str]) -> float:
    total = 0.0
    for size in range(len(others) + 1):
        share = 1 / ((len(others) + 1) * math.comb(len(others), size))
        for coalition in map(frozenset, itertools.combinations(others, size)):
            total += share * (worth(coalition | {player}) - worth(coalition))
    return total


class KeepUpdates(Wrapped):
    """An engine that keeps every update that arrives, one file a site and round.

    They are what the server sees anyway, so a guarantee given at the sites covers the files as well. Where noise is
    added at the server, or where updates are hidden from it, nothing is kept and the run is refused. Without a
    guarantee the files can tell about patients (gradient inversion): keep them where the server's own data may lie.

    Args:
        engine: where the sites work.
        folder: new, or of this very run; each update takes as many bytes as the model.
    """

    def __init__(self, *, engine: Engine, folder: Path | str) -> None:
        self.engine, self.folder = engine, Path(folder)
        self._round: tuple[int, str] | None = None

    def train(self, task: SiteTask, state: ServerState, cohort: Sequence[Site], states: SiteStates) -> Iterator[Answer]:
        """The answer of each site, kept and handed on.

        Raises:
            PrivacyError: no single update may be kept under the technique of this run.
            RunError: the folder holds something else.
            ValueError: the workflow has no one model that all sites of a round start from.
        """
        self._begin(task, state)
        folder = self.folder / f"round-{state.round:04d}"
        folder.mkdir(exist_ok=True)
        for answer in self.engine.train(task, state, cohort, states):
            if isinstance(answer, Update) and _usable(answer, state):  # an update that the server refuses is not kept
                _write(folder / f"{quote(answer.site, safe='')}.safetensors", answer.delta,
                       {"weight": answer.weight, "steps": answer.steps})
            yield answer

    def _begin(self, task: SiteTask, state: ServerState) -> None:
        if task.aggregation.hides_updates or task.privacy.works_at_server:
            what = task.aggregation if task.aggregation.hides_updates else task.privacy
            raise PrivacyError(f"single updates cannot be kept under {what!r}: its guarantee covers their mean only; "
                               "leave KeepUpdates out")
        here = weights_sha256(state.params)
        if state.models or (self._round is not None and self._round[0] == state.round and self._round[1] != here):
            raise ValueError("models without a site are put together for topology=star only, where all sites of a "
                             "round start from one model")
        self._round = state.round, here
        note = {"format": _FORMAT, "seed": task.seed,
                "recipe_sha256": recipe_sha256([task.trainer, task.strategy, task.privacy])}
        path = self.folder / "run.json"
        if path.is_file():
            if json.loads(path.read_text(encoding="utf-8")) != note:
                raise RunError(f"{self.folder} holds the updates of another run; choose another folder")
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise RunError(f"{self.folder} is not empty and holds no updates; choose another folder")
        elif state.round:
            raise RunError(f"the updates of the rounds before {state.round} were not kept; keep them from the start")
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write(self.folder / "start.safetensors", state.params, {})
            path.write_text(json.dumps(note, indent=1, ensure_ascii=False), encoding="utf-8")

    def __repr__(self) -> str:
        return f"KeepUpdates(engine={self.engine!r}, folder={str(self.folder)!r})"


@dataclass(frozen=True, kw_only=True, eq=False)
class Contributions:
    """What each site's updates are worth, and what it cost to find out.

    Attributes:
        table: a row a site: shapley, standard error, leave one out.
        nobody: worth of the model before the first round.
        everybody: worth of the model of all; the Shapley values add up to the difference.
        evaluations: models that were put together and evaluated.
        stored_bytes: of all updates kept.
        seconds: that it took.
        how: the method, in words.
    """

    table: pd.DataFrame
    nobody: float
    everybody: float
    evaluations: int
    stored_bytes: int
    seconds: float
    how: str

    def __str__(self) -> str:
        return (f"{self.table.to_string(float_format='{:.4f}'.format)}\nfrom {self.nobody:.4f} (nobody) to "
                f"{self.everybody:.4f} (everybody); {self.how}; {self.evaluations} models evaluated in "
                f"{self.seconds:.1f} s, {self.stored_bytes / 1e6:.1f} MB of updates kept")

    def _repr_html_(self) -> str:
        html: str = self.table.to_html(float_format="{:.4f}".format)
        return f"{html}<p>From {self.nobody:.4f} (nobody) to {self.everybody:.4f} (everybody); {self.how}; " \
               f"{self.evaluations} models evaluated in {self.seconds:.1f} s, {self.stored_bytes / 1e6:.1f} MB kept</p>"


def site_contributions(
    history: History, folder: Path | str, utility: Callable[[Tensors], float], *, strategy: Strategy | None = None,
    permutations: int | None = None, tolerance: float = 0.0, seed: int = 0,
) -> Contributions:
    """Leave-one-out and Shapley values of the sites of a run.

    The model of a coalition is what the run's rounds make of its updates alone, from the run's start. The utility sees
    held-out patients, whose results the values tell about: they are no private release.

    Args:
        history: of the run, which says whose updates were let in.
        folder: what `KeepUpdates` kept of it.
        utility: of a model's weights, larger is better; such as `dice_on(trainer.model, patients)`.
        strategy: of the run; `FedAvg()` by default.
        permutations, tolerance, seed: as in `shapley`; with n sites all coalitions are 2^n evaluations.

    Raises:
        RunError: the updates are missing or damaged, or don't give the model of this run.
        ValueError: as in `shapley`.
    """
    import pandas as pd

    started, folder = time.perf_counter(), Path(folder)
    strategy = FedAvg() if strategy is None else strategy
    sites = sorted({name for record in history.records for name in record["sites"]})
    if history.state is None or not sites:
        raise RunError("no update entered the model in this run, so there is nothing to share out")
    everybody = frozenset(sites)
    if weights_sha256(_model_of(folder, history, strategy, everybody)) != weights_sha256(history.state.params):
        raise RunError(f"the updates in {folder} do not give the model of this run: they are of another run, or it had "
                       f"another strategy than {strategy!r}")
    worth = _Remembered(lambda coalition: utility(_model_of(folder, history, strategy, coalition)))
    values = shapley(worth, sites, permutations=permutations, tolerance=tolerance, seed=seed)
    without = leave_one_out(worth, sites)
    table = pd.DataFrame({"shapley": values.value, "standard error": values.error, "leave one out": without.value})
    how = "Shapley values over all coalitions" if permutations is None else (
        f"Shapley values from {permutations} permutations" + (f", truncated at {tolerance:g}" if tolerance else ""))
    return Contributions(table=table.rename_axis("site"), nobody=worth(frozenset()), everybody=worth(everybody),
                         evaluations=len(worth.found), how=how, seconds=time.perf_counter() - started,
                         stored_bytes=sum(file.stat().st_size for file in folder.rglob("*.safetensors")))


def dice_on(model: torch.nn.Module, patients: Sequence[Any], *, precision: str = "auto",
            ) -> Callable[[Tensors], float]:
    """A utility: mean Dice over regions of patients or of sites' held-out patients; see `training.metrics.evaluate`.

    The model itself is left as it is.
    """
    from fedlab.core.weights import load_weights
    from fedlab.training.metrics import evaluate

    own = copy.deepcopy(model)

    def dice(params: Tensors) -> float:
        load_weights(own, params)
        return float(evaluate(own, patients, precision=precision).groupby("region")["dice"].mean().mean())

    return dice


def _usable(update: Update, state: ServerState) -> bool:
    try:
        check_update(update, like=state.params, site=update.site)
    except PrivacyError:
        return False
    return True


def _model_of(folder: Path, history: History, strategy: Strategy, coalition: frozenset[str]) -> Tensors:
    """The weights that the run's rounds make of a coalition's updates."""
    start, _ = _read(folder / "start.safetensors")
    state = strategy.begin(start)
    for record in history.records:
        names = [name for name in record["sites"] if name in coalition]
        updates = (_update(folder / f"round-{record['round']:04d}", name, record["round"]) for name in names)
        try:
            state = strategy.step(state, strategy.combine(updates))
        except TooFewUpdates:
            state = ServerState(**{**vars(state), "round": state.round + 1})
    return state.params


def _update(folder: Path, site: str, round: int) -> Update:
    delta, note = _read(folder / f"{quote(site, safe='')}.safetensors")
    return Update(site=site, delta=delta, weight=float(note["weight"]), steps=int(note["steps"]), round=round)


def _write(path: Path, tensors: Tensors, note: Mapping[str, float]) -> None:
    scratch = path.with_name(path.name + ".part")
    header = {"order": json.dumps(list(tensors)), **{name: repr(value) for name, value in note.items()}}
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, scratch, metadata=header)
    os.replace(scratch, path)


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata()
            return {name: file.get_tensor(name) for name in json.loads(header["order"])}, header
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise RunError(f"{path} is missing or damaged ({error}); the run has to keep its updates from the "
                       "start") from error
