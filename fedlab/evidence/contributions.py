"""What each site has contributed to a model: leave-one-out and Shapley values, from the updates of one run.

No model is trained again: a model "without Basel" is formed from the stored updates of the others, as Song et al. 2019
(Profit allocation for federated learning, IEEE Big Data) propose. The values are those of a site's updates in this run;
without the site, the others' updates would have been different.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fedlab.core.errors import PrivacyError, RunError
from fedlab.core.files import write_json, write_whole
from fedlab.core.gate import check_update
from fedlab.core.protocols import Engine, Strategy
from fedlab.core.seeds import generator
from fedlab.core.types import Answer, Failure, Messages, ServerState, Site, Tensors, Update
from fedlab.core.weights import load_weights, weights_sha256
from fedlab.run.history import History
from fedlab.run.recipe import recipe_sha256
from fedlab.run.site_states import SiteStates
from fedlab.run.site_task import SiteTask
from fedlab.strategies.averaging import FedAvg, TooFewUpdates
from fedlab.training.metrics import evaluate

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Contributions", "KeepUpdates", "Values", "dice_on", "leave_one_out", "shapley", "site_contributions"]

#: The largest number of players of whom all coalitions, 2 to that power, are evaluated.
_EXACT = 12
_FORMAT = "fedlab-updates-1"

#: The worth of a coalition.
Worth = Callable[[frozenset[str]], float]


@dataclass(frozen=True, kw_only=True, eq=False)
class Values:
    """The values of the players of a game."""

    value: Mapping[str, float]  # by player
    error: Mapping[str, float]  # standard error of each value; 0 where all coalitions were evaluated
    evaluations: int  # number of coalitions that were evaluated, each once


def shapley(worth: Worth, players: Sequence[str], *, permutations: int | None = None, tolerance: float = 0.0,
            seed: int = 0) -> Values:
    """The Shapley value: what each player adds, on average over the orders in which players may join.

    The values add up to the worth of all players minus that of none; players who add the same to every coalition have
    the same value; one who adds nothing has the value 0 (Shapley 1953).

    Args:
        worth: of a coalition; called once for each.
        players: their names.
        permutations: number of random orders (Castro et al. 2009); None evaluates all 2^n coalitions.
        tolerance: an order ends as soon as the worth of the joined players is within this of that of all (truncation,
            Ghorbani and Zou 2019); the sum of the values is then exact to this much only.
        seed: of the orders.

    Raises:
        ValueError: too many players for all coalitions, fewer than 2 permutations, or a negative tolerance.
    """
    if permutations is None and len(players) > _EXACT:
        raise ValueError(f"{len(players)} players have 2^{len(players)} coalitions; give permutations=, such as 200")
    if permutations is not None and permutations < 2:
        raise ValueError(f"permutations is at least 2, since one order has no standard error; got {permutations}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance is at least 0, got {tolerance}")
    known = functools.cache(worth)
    if permutations is None:
        value = {player: _exact(known, player, frozenset(players) - {player}) for player in players}
        return Values(value=value, error=dict.fromkeys(players, 0.0), evaluations=known.cache_info().currsize)
    table = _sampled(known, players, permutations, tolerance, seed)
    mean, error = (dict(zip(players, map(float, numbers), strict=True)) for numbers in (table.mean(), table.sem()))
    return Values(value=mean, error=error, evaluations=known.cache_info().currsize)


def leave_one_out(worth: Worth, players: Sequence[str]) -> Values:
    """The worth of all players minus that of all but one: n + 1 coalitions. The values have no particular sum.

    Of two sites with the same patients each seems worthless, since the other one remains.
    """
    known, everyone = functools.cache(worth), frozenset(players)
    value = {player: known(everyone) - known(everyone - {player}) for player in players}
    return Values(value=value, error=dict.fromkeys(players, 0.0), evaluations=known.cache_info().currsize)


def _exact(worth: Worth, player: str, others: frozenset[str]) -> float:
    total = 0.0
    for size in range(len(others) + 1):
        share = 1 / ((len(others) + 1) * math.comb(len(others), size))
        for coalition in map(frozenset, itertools.combinations(sorted(others), size)):
            total += share * (worth(coalition | {player}) - worth(coalition))
    return total


def _sampled(worth: Worth, players: Sequence[str], permutations: int, tolerance: float, seed: int) -> pd.DataFrame:
    """What each player adds (columns) in random orders (rows)."""
    import pandas as pd

    rng, rows, everyone = generator(seed, "shapley"), [], frozenset(players)
    for _ in range(permutations):
        order = [players[k] for k in torch.randperm(len(players), generator=rng).tolist()]
        row, joined = dict.fromkeys(players, 0.0), frozenset[str]()
        for player in order:
            if tolerance and abs(worth(everyone) - worth(joined)) <= tolerance:
                break
            row[player] = worth(joined | {player}) - worth(joined)
            joined |= {player}
        rows.append(row)
    return pd.DataFrame(rows, columns=list(players))


class KeepUpdates:
    """An engine that stores every update that arrives, one file per site and round.

    The server sees them anyway, so a guarantee given at the sites covers the files as well. Where noise is added at the
    server, or where updates are hidden from it, nothing is stored and the run is refused. Without a guarantee the files
    can reveal patients (gradient inversion): keep them where the server's own data may lie.

    Args:
        engine: where the sites work.
        folder: new, or of this very run; each update takes as many bytes as the model.
    """

    def __init__(self, *, engine: Engine, folder: Path | str) -> None:
        self.engine, self.folder = engine, Path(folder)
        self._round: tuple[int, str] | None = None

    def train(self, task: SiteTask, state: ServerState, cohort: Sequence[Site], states: SiteStates) -> Iterator[Answer]:
        """The answer of each site, stored and passed on.

        Raises:
            PrivacyError: no single update may be stored under the technique of this run.
            RunError: the folder holds something else.
            ValueError: the sites of a round start from several models.
        """
        self._begin(task, state)
        folder = self.folder / f"round-{state.round:04d}"
        folder.mkdir(exist_ok=True)
        for answer in self.engine.train(task, state, cohort, states):
            with suppress(PrivacyError):  # an update that the server refuses is not kept
                update = check_update(answer, like=state.params, buffers=state.buffers, site=answer.site)
                _write(folder / f"{quote(update.site, safe='')}.safetensors", update.delta,
                       {"weight": update.weight, "steps": update.steps})
            yield answer

    def exchange(self, task: SiteTask, step: str, inboxes: Messages, sites: Sequence[Site],
                 states: SiteStates) -> tuple[Messages, list[Failure]]:
        """The exchange of the inner engine."""
        return self.engine.exchange(task, step, inboxes, sites, states)

    def _begin(self, task: SiteTask, state: ServerState) -> None:
        if task.aggregation.hides_updates or task.privacy.works_at_server:
            what = task.aggregation if task.aggregation.hides_updates else task.privacy
            raise PrivacyError(f"single updates cannot be kept under {what!r}: its guarantee covers their mean only; "
                               "leave KeepUpdates out")
        star_only = ValueError("a model without one site is defined for topology=star only, where all sites of a round "
                                "start from one model")
        if state.models:
            raise star_only
        if state.model.keys() > state.params.keys():
            raise ValueError("a model without one site is defined for weights only, not for buffers such as batch "
                             "norm's statistics; use group norm, or SiteTrainer(buffers='keep')")
        start = weights_sha256(state.params)
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
            write_json(path, note)
        if self._round is not None and self._round[0] == state.round and self._round[1] != start:
            raise star_only
        self._round = state.round, start

    def __repr__(self) -> str:
        return f"KeepUpdates(engine={self.engine!r}, folder={str(self.folder)!r})"


@dataclass(frozen=True, kw_only=True, eq=False)
class Contributions:
    """The values of each site's updates, and the cost of computing them.

    Attributes:
        table: one row per site: shapley, standard error, leave one out.
        start: worth of the model before the first round.
        end: worth of the model with the updates of all sites; the Shapley values add up to the difference.
        evaluations: number of models that were formed and evaluated.
        stored_bytes: of all stored updates.
        seconds: wall time.
        method: in words.
    """

    table: pd.DataFrame
    start: float
    end: float
    evaluations: int
    stored_bytes: int
    seconds: float
    method: str

    def _summary(self) -> str:
        return (f"from {self.start:.4f} (no site) to {self.end:.4f} (all sites); {self.method}; {self.evaluations} "
                f"models evaluated in {self.seconds:.1f} s, {self.stored_bytes / 1e6:.1f} MB of updates kept")

    def __str__(self) -> str:
        return f"{self.table.to_string(float_format='{:.4f}'.format)}\n{self._summary()}"

    def _repr_html_(self) -> str:
        return f"{self.table.to_html(float_format='{:.4f}'.format)}<p>{self._summary()}</p>"


def site_contributions(
    history: History, folder: Path | str, utility: Callable[[Tensors], float], *, strategy: Strategy | None = None,
    permutations: int | None = None, tolerance: float = 0.0, seed: int = 0,
) -> Contributions:
    """Leave-one-out and Shapley values of the sites of a run.

    The model of a coalition is the result of the run's rounds, from the run's start, with its updates alone. The
    utility is computed on held-out patients, and the values reveal their results: they are no private release.

    Args:
        history: of the run; it says whose updates were let in.
        folder: of `KeepUpdates`.
        utility: of a model's weights, larger is better; such as `dice_on(trainer.model, patients)`.
        strategy: of the run, with the settings that it reads from the run, such as `FedNova(momentum=0.9)`;
            `FedAvg()` by default.
        permutations, tolerance, seed: as in `shapley`; with n sites all coalitions are 2^n evaluations.

    Raises:
        RunError: the updates are missing or damaged, or do not give the model of this run.
        ValueError: as in `shapley`.
    """
    import pandas as pd

    started, folder = time.perf_counter(), Path(folder)
    strategy = FedAvg() if strategy is None else strategy
    sites = sorted({name for record in history.records for name in record["sites"]})
    if history.state is None or not sites:
        raise RunError("no update entered the model in this run, so the sites have no contributions")
    if weights_sha256(_model_of(folder, history, strategy, frozenset(sites))) != weights_sha256(history.state.params):
        raise RunError(f"the updates in {folder} do not give the model of this run: they are of another run, or it had "
                       f"another strategy than {strategy!r}")
    worth = functools.cache(lambda coalition: float(utility(_model_of(folder, history, strategy, coalition))))
    values = shapley(worth, sites, permutations=permutations, tolerance=tolerance, seed=seed)
    without = leave_one_out(worth, sites)
    table = pd.DataFrame({"shapley": values.value, "standard error": values.error, "leave one out": without.value})
    method = "Shapley values over all coalitions" if permutations is None else (
        f"Shapley values from {permutations} permutations" + (f", truncated at {tolerance:g}" if tolerance else ""))
    return Contributions(table=table.rename_axis("site"), start=worth(frozenset()), end=worth(frozenset(sites)),
                         evaluations=worth.cache_info().currsize, method=method, seconds=time.perf_counter() - started,
                         stored_bytes=sum(file.stat().st_size for file in folder.rglob("*.safetensors")))


def dice_on(model: torch.nn.Module, patients: Sequence[Any], *, precision: str = "auto",
            ) -> Callable[[Tensors], float]:
    """A utility: mean Dice over regions of patients or of sites' held-out patients; see `training.metrics.evaluate`.

    The model itself does not change.
    """
    own = copy.deepcopy(model)

    def dice(params: Tensors) -> float:
        load_weights(own, params)
        return float(evaluate(own, patients, precision=precision).groupby("region")["dice"].mean().mean())

    return dice


def _model_of(folder: Path, history: History, strategy: Strategy, coalition: frozenset[str]) -> Tensors:
    """The weights after the run's rounds with a coalition's updates alone."""
    start, _ = _read(folder / "start.safetensors")
    state = strategy.begin(start)
    for record in history.records:
        names = [name for name in record["sites"] if name in coalition]
        stored = (_read(folder / f"round-{record['round']:04d}" / f"{quote(name, safe='')}.safetensors")
                  for name in names)
        updates = (Update(site=name, delta=delta, weight=float(note["weight"]), steps=int(note["steps"]),
                          round=record["round"]) for name, (delta, note) in zip(names, stored, strict=True))
        try:
            state = strategy.step(state, strategy.combine(updates))
        except TooFewUpdates:
            state = replace(state, round=state.round + 1)
    return state.params


def _write(path: Path, tensors: Tensors, note: Mapping[str, float]) -> None:
    header = {name: repr(value) for name, value in note.items()}
    write_whole(path, save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, metadata=header))


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise RunError(f"{path} is missing or damaged ({error}); use KeepUpdates from the run's start on") from error
