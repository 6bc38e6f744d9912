"""What a site allows: a policy that is stored at the site and that no server can relax."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from fedlab.core.errors import PrivacyBudgetExhausted, PrivacyError
from fedlab.core.settings import check_whole
from fedlab.core.text import counted
from fedlab.core.types import ServerState, SiteState, Spent, rounded_up
from fedlab.deploy.limits import Limits, clips_in
from fedlab.deploy.plan import Plan
from fedlab.deploy.required import Required, is_number
from fedlab.privacy.accounting.ledger import Ledger
from fedlab.privacy.aggregation import Aggregation
from fedlab.privacy.base import Privacy, technique_at
from fedlab.run.history import draws_noise

__all__ = ["Budget", "Required", "SitePolicy"]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The most privacy that a site spends over all runs that its ledger knows: ε, and the largest δ to state it at.

    Raises:
        ValueError: an invalid budget.
    """

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        if not (is_number(self.epsilon) and 0 < self.epsilon < math.inf
                and is_number(self.delta) and 0 < self.delta < 1):
            raise ValueError(f"a budget is a positive epsilon and a delta between 0 and 1, got {self!r}")


@dataclass(frozen=True, kw_only=True)
class SitePolicy(Limits):
    """What a site allows of a run that a server proposes. By default it requires only that all code is known to it.

    The limits of a round's work are those of `Limits`.

    Args:
        require: techniques that every run must protect this site with.
        budgets: the most privacy to spend, by unit ("patient", "site"). A unit with a budget must be protected.
        max_rounds: most rounds of a run, and most different models that this site answers in one run.
        max_updates: most updates that this site ever sends, over all runs. An update that is asked for again is sent
            again and counts again, also after a restart, and whether or not the server uses it: with noise from the
            operating system each is another one, and their mean has less noise.
        secure_mode: whether all noise that a guarantee rests on must come from the operating system.
        min_sites: fewest sites that a run must have.
        approved: technique files in the site's folder `techniques/`, module name to SHA-256 of the file.
        installed: names of installed modules beyond fedlab, torch and MONAI that a plan may name. Of them, as of an
            approved file, a plan makes parts of a run only, see `fedlab.deploy.objects`.
        tell_errors: whether the text of errors may leave this site, where no guarantee forbids it: it can quote file
            names, values or pseudonyms. Otherwise the server receives the kind of the error and the stage.

    Raises:
        ValueError: a setting out of its range.
    """

    require: tuple[Required, ...] = ()
    budgets: Mapping[str, Budget] = field(default_factory=dict)
    max_rounds: int | None = None
    max_updates: int | None = None
    secure_mode: bool = False
    min_sites: int = 1
    approved: Mapping[str, str] = field(default_factory=dict)
    installed: tuple[str, ...] = ()
    tell_errors: bool = False

    def __post_init__(self) -> None:
        check_whole(optional=True, max_rounds=self.max_rounds, max_updates=self.max_updates)
        check_whole(min_sites=self.min_sites)
        self.check_limits()
        for name in ("secure_mode", "tell_errors"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is true or false, got {getattr(self, name)!r}")
        if not self.budgets.keys() <= {"patient", "site"}:
            raise ValueError(f"budgets are per 'patient' or per 'site', got {sorted(self.budgets)}")
        if isinstance(self.installed, str) or not all(isinstance(name, str) for name in self.installed):
            raise ValueError(f"installed is a list of names of modules, got {self.installed!r}")
        for module, digest in self.approved.items():
            if not module.isidentifier() or len(digest) != 64 or set(digest) - set("0123456789abcdef"):
                raise ValueError(f"approved files are a module name and a SHA-256 of 64 hexadecimal digits, got "
                                 f"{module!r} = {digest!r}")

    def check_plan(self, plan: Plan, privacy: Privacy, aggregation: Aggregation, *, site: str) -> None:
        """Refuses a run that this site does not allow.

        Raises:
            PrivacyError: with the rule, the plan's setting and the allowed one.
        """
        if site not in plan.sites:
            raise PrivacyError(f"the plan names the sites {list(plan.sites)[:20]}, this one is {site!r}")
        privacy = technique_at(privacy, site)  # techniques for other sites do not protect this one
        if len(plan.sites) < self.min_sites:
            raise PrivacyError(f"min_sites: this site takes part in runs of at least {counted(self.min_sites, 'site')}"
                               f", the plan has {len(plan.sites)}")
        if self.max_rounds is not None and plan.rounds > self.max_rounds:
            raise PrivacyError(f"max_rounds: this site takes part in at most {counted(self.max_rounds, 'round')} of a "
                               f"run, the plan has {plan.rounds}")
        for required in self.require:
            required.check(privacy, aggregation)
        parts: tuple[Privacy | Aggregation, ...] = (*privacy.layers, aggregation)
        for part in parts if self.secure_mode else ():
            if draws_noise(part) and getattr(part, "secure_mode", False) is not True:
                raise PrivacyError(f"secure_mode: this site takes noise from the operating system only, which "
                                   f"{type(part).__name__}(secure_mode=True) does; the plan has {part!r}")
        for unit, budget in self.budgets.items():
            if unit not in privacy.units | aggregation.units:
                raise PrivacyError(f"budget: this site spends at most ε = {budget.epsilon:g} per {unit}, and "
                                   f"{privacy!r} with {aggregation!r} gives no guarantee per {unit}: the loss would "
                                   "have no bound")
            stated = max((getattr(part, "delta", None) or 0.0 for part in parts if unit in part.units), default=0.0)
            if stated > budget.delta:
                raise PrivacyError(f"budget: this site states ε per {unit} at δ of at most {budget.delta:g}, the plan "
                                   f"has {stated:g}")

    def check_round(self, state: ServerState, site_state: SiteState) -> None:
        """Before a round: whether its clipping norms are within the policy, wherever they are kept.

        Raises:
            PrivacyError: a clipping norm that the server broadcasts, or that a technique of this site has moved, is
                beyond `broadcast_clip` or the limits of a required technique.
        """
        for clip in clips_in(state.broadcast):
            self.check_clip(clip)
        own = (slots for owner, slots in site_state.namespaces.items() if owner.startswith("privacy"))
        for clip in clips_in(state.broadcast, *own):
            for required in self.require:
                required.check_clip(clip)

    def check_spent(self, ledger: Ledger | None) -> None:
        """Before an update leaves: whether this round was charged to the site's ledger, and within its budgets.

        Raises:
            PrivacyBudgetExhausted: the ledger exceeds a budget; the update must not leave.
            PrivacyError: the round was not charged for a unit that has a budget, or at a larger δ, or with noise that
                repeats where the policy says secure_mode.
        """
        if self.secure_mode and ledger is not None and ledger.seeded:
            raise PrivacyError("secure_mode: this site takes noise from the operating system only; that of this round "
                               "was drawn from the seed of the run")
        by_unit: dict[str, Spent] = {one.unit: one for one in ledger.spent()} if ledger else {}
        for unit, budget in self.budgets.items():
            terms = f"ε = {budget.epsilon:g} per {unit} at δ = {budget.delta:g}"
            one = by_unit.get(unit)
            if one is None or ledger is None or not ledger.charged(one.unit) or not one.delta <= budget.delta:
                raise PrivacyError(f"budget: the site's budget is {terms}; its ledger was not charged per {unit} for "
                                   f"this round at such a δ, it says {one or 'nothing'} about the {unit}")
            if not one.epsilon <= budget.epsilon:
                raise PrivacyBudgetExhausted(f"this site's budget is {terms}; with this update it would have spent "
                                             f"{rounded_up(one.epsilon, 4)} at δ = {one.delta:g}")

    def lines(self) -> list[str]:
        """The policy in words, a line per rule; approved files are left out."""
        rules = [
            *(f"requires {required!r}" for required in self.require),
            *(f"spends at most ε = {budget.epsilon:g} per {unit} at δ = {budget.delta:g}"
              for unit, budget in self.budgets.items()),
            self.secure_mode and "draws noise from the operating system only (secure_mode)",
            self.max_rounds and f"max_rounds = {self.max_rounds}",
            self.max_updates and f"max_updates = {self.max_updates}",
            *self.limit_lines(),
            self.min_sites > 1 and f"takes part in runs of at least {counted(self.min_sites, 'site')}",
            self.installed and f"runs may name the installed modules {', '.join(self.installed)}",
            self.tell_errors and "sends the server the text of errors where no guarantee forbids it",
        ]
        return [rule for rule in rules if isinstance(rule, str)] or [
            "demands nothing but code known to this site: anyone with the server's key can request plain updates; see "
            "site.toml"]

    def access(self, techniques: Path) -> dict[str, Any]:
        """Arguments of `Plan.parts`: how code is approved and loaded here. `techniques` holds the approved files."""
        return {"approve": partial(self.approve, techniques=techniques),
                "load": partial(self.load, techniques=techniques)}

    def approve(self, module: str, *, techniques: Path) -> None:
        """Refuses a module that this site does not know; nothing is imported. `techniques` holds the approved files.

        Raises:
            PrivacyError: the module is neither fedlab's nor approved, or its file is not the approved one.
        """
        if module.partition(".")[0] in ("fedlab", "torch", "monai") or module in self.installed:
            return  # what a plan may name of them is decided in fedlab.deploy.objects
        if module not in self.approved:
            raise PrivacyError(f"the plan needs the module {module!r}, which this site has not approved; review the "
                               "file and approve it at the site with: fedlab site approve FOLDER FILE")
        self._source(module, techniques)

    def load(self, module: str, *, techniques: Path) -> ModuleType:
        """Imports an approved module; a technique's file runs from the very bytes whose hash was compared.

        Raises:
            PrivacyError: as `approve`, or the file cannot be run.
            ImportError: a module that is not installed.
        """
        self.approve(module, techniques=techniques)
        if module not in self.approved or module in sys.modules:
            return importlib.import_module(module)
        if importlib.util.find_spec(module) is not None:
            raise PrivacyError(f"{module}.py has the name of a module that is installed here; give the file another "
                               "name")
        path = Path(techniques) / f"{module}.py"
        made = ModuleType(module)
        made.__file__ = str(path)
        sys.modules[module] = made
        try:
            exec(compile(self._source(module, techniques), str(path), "exec"), vars(made))
        except Exception as error:
            del sys.modules[module]
            raise PrivacyError(f"the approved file {path} cannot be run ({type(error).__name__})") from error
        return made

    def _source(self, module: str, techniques: Path) -> bytes:
        """The bytes of an approved file, or of the module of that name that this process already has."""
        path = Path(techniques) / f"{module}.py"
        if module in sys.modules:
            path = Path(getattr(sys.modules[module], "__file__", None) or path)
        try:
            source = path.read_bytes()
        except OSError as error:
            raise PrivacyError(f"the approved file {path} cannot be read ({type(error).__name__}); put it "
                               "back") from error
        found = hashlib.sha256(source).hexdigest()
        if found != self.approved[module]:
            raise PrivacyError(f"{path} has the SHA-256 {found}, approved is {self.approved[module]}: it was changed "
                               "since; review it and approve it again")
        return source

