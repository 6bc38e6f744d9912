"""The frame of every privacy technique: hooks around local training and aggregation."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

import torch

from fedlab.core.errors import FedlabError, PrivacyError
from fedlab.core.types import Cohort, Failure, Memory, Site, Spent, Tensors, Update

if TYPE_CHECKING:
    from fedlab.strategies.averaging import Strategy
    from fedlab.training.trainer import Kit, SiteTrainer

__all__ = ["Inboxes", "PartialExchange", "Privacy", "check_update", "importable"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
#: Products of a few such numbers are still finite in float64.
_LARGEST = 1e90

#: Messages on their way: recipient -> sender -> bytes. The server is called "server".
Inboxes = Mapping[str, Mapping[str, bytes]]


class PartialExchange(FedlabError):
    """An exchange of messages in which some sites failed; an engine raises it when it has asked them all.

    Attributes:
        sent: what the others sent, by sender and recipient.
        failures: who failed, and how.
    """

    def __init__(self, sent: Inboxes, failures: Sequence[Failure]) -> None:
        super().__init__("; ".join(str(failure.error) for failure in failures))
        self.sent, self.failures = sent, tuple(failures)

    def __reduce__(self) -> tuple[type[PartialExchange], tuple[Inboxes, tuple[Failure, ...]]]:
        return PartialExchange, (self.sent, self.failures)  # survives worker processes


class Privacy:
    """A privacy technique. Every hook is the identity: override what the technique needs.

    `a + b` applies a, then b at the site, and b, then a at the server, as layers of an onion.

    A technique with a proven guarantee enters what it releases into the site's ledger
    (`fedlab.privacy.accounting.ledger.Ledger`) and names the unit it protects in `units`; a round in which the ledger was not
    charged for such a unit is refused. Without units the technique has no formal guarantee and is labelled so.

    Attributes:
        units: what the guarantee given at the site protects: {"patient"}, {"site"} or both.
        before, after: names of exchanges of messages between the sites, by way of the server, before training and
            after all updates are in; see `at_site`.
        masks: whether protect() only hides the update on its way, so that this technique's unmask() gives back the
            mean of the updates that protect() was given, or of shorter ones: true of secure aggregation.
    """

    units: frozenset[str] = frozenset()
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    masks: bool = False

    @property
    def works_at_server(self) -> bool:
        """Whether it changes the mean of the updates at a server."""
        return any(type(layer).release is not Privacy.release for layer in self._layers())

    @property
    def masked(self) -> bool:
        """Whether updates are hidden on their way."""
        return any(layer.masks for layer in self._layers())

    def at(self, site: str) -> Privacy:
        """What of it works at a site: all of it, unless sites differ; see `AtSites`."""
        return self

    def check_order(self, *, before: Sequence[Privacy], after: Sequence[Privacy]) -> None:
        """When joined by `+`: raises `ValueError` if this technique cannot stand between those."""

    def check_run(self, *, trainer: SiteTrainer, sites: Sequence[Site], strategy: Strategy, rounds: int) -> None:
        """Before the first round: raises `ValueError` if the technique cannot work with the rest of the run."""

    def equip(self, kit: Kit, site: Site, memory: Memory) -> Kit:
        """Before local training, at the site: wrap the model, the optimiser or the loader."""
        return kit

    def protect(self, update: Update, memory: Memory, rng: torch.Generator) -> Update:
        """The last thing before an update leaves the site."""
        return update

    def unmask(self, mean: Update, cohort: Cohort, memory: Memory) -> Update:
        """At the server, before release(): what was hidden by masks that the exchange `after` has recovered.

        Masks come from the operating system; the noise of release() repeats with a seed, so it may depend on what this
        returns and not on what came.
        """
        return mean

    def release(self, mean: Update, cohort: Cohort, memory: Memory, rng: torch.Generator) -> Update:
        """At the server, between combining the cohort's updates and moving the model.

        Args:
            mean: the combination, float64; zeros if nobody took part.
            cohort: who took part.
            memory: the server's own, kept from round to round; its group "broadcast" goes to the sites.
            rng: where noise comes from.
        """
        return mean

    def at_site(self, step: str, site: str, inbox: Mapping[str, bytes], memory: Memory) -> Mapping[str, bytes]:
        """A site's part in an exchange: what it answers, by recipient, to the messages that came, by sender."""
        return {}

    def at_server(self, step: str, sent: Inboxes, memory: Memory, arrived: Sequence[str]) -> Inboxes:
        """The server's part: hand on what the sites sent in `step`, as recipient -> sender -> message.

        Args:
            step: the exchange that has ended; "trained" once all updates are in, before the first of `after`.
            sent: sender -> recipient -> message.
            memory: the server's own; a step's messages to "server" belong there.
            arrived: sites whose update has come.
        """
        inboxes: dict[str, dict[str, bytes]] = {}
        for sender, messages in sent.items():
            for recipient, message in messages.items():
                inboxes.setdefault(recipient, {})[sender] = message
        return inboxes

    def __add__(self, other: Privacy) -> Privacy:
        return _Stack(*self._layers(), *other._layers())

    def _layers(self) -> tuple[Privacy, ...]:
        return (self,)

    def __repr__(self) -> str:
        settings = ", ".join(f"{k}={v!r}" for k, v in vars(self).items() if not k.startswith("_"))
        return f"{type(self).__name__}({settings})"


class _Stack(Privacy):
    """Several techniques in order; made by `+`."""

    def __init__(self, *layers: Privacy) -> None:
        talking = [layer for layer in layers if layer.before or layer.after]
        if len(talking) > 1:
            raise ValueError(f"only one technique of a run may exchange messages between sites, got {talking}")
        for place, layer in enumerate(layers):
            layer.check_order(before=layers[:place], after=layers[place + 1:])
        self.layers = layers
        self._talker = talking[0] if talking else Privacy()
        self.units = frozenset().union(*(layer.units for layer in layers))
        self.before, self.after = self._talker.before, self._talker.after

    def at(self, site: str) -> Privacy:
        here = [part for layer in self.layers for part in layer.at(site)._layers() if type(part) is not Privacy]
        if len(here) == len(self.layers) and all(map(operator.is_, here, self.layers)):
            return self
        return _Stack(*here) if len(here) > 1 else here[0] if here else Privacy()

    def check_run(self, *, trainer: SiteTrainer, sites: Sequence[Site], strategy: Strategy, rounds: int) -> None:
        for layer in self.layers:
            layer.check_run(trainer=trainer, sites=sites, strategy=strategy, rounds=rounds)

    def equip(self, kit: Kit, site: Site, memory: Memory) -> Kit:
        for layer in self.layers:
            kit = layer.equip(kit, site, memory)
        return kit

    def protect(self, update: Update, memory: Memory, rng: torch.Generator) -> Update:
        for layer in self.layers:
            update = check_update(layer.protect(update, memory, rng), like=update.delta, site=update.site)
        return update

    def unmask(self, mean: Update, cohort: Cohort, memory: Memory) -> Update:
        return self._talker.unmask(mean, cohort, memory)

    def release(self, mean: Update, cohort: Cohort, memory: Memory, rng: torch.Generator) -> Update:
        for layer in reversed(self.layers):
            mean = layer.release(mean, cohort, memory, rng)
        return mean

    def at_site(self, step: str, site: str, inbox: Mapping[str, bytes], memory: Memory) -> Mapping[str, bytes]:
        return self._talker.at_site(step, site, inbox, memory)

    def at_server(self, step: str, sent: Inboxes, memory: Memory, arrived: Sequence[str]) -> Inboxes:
        return self._talker.at_server(step, sent, memory, arrived)

    def _layers(self) -> tuple[Privacy, ...]:
        return self.layers

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.layers))


def check_update(update: object, *, like: Tensors, site: str) -> Update:
    """The update if it is safe to pass on.

    Args:
        update: what a technique returned or a site sent.
        like: tensors whose names and shapes it must have.
        site: who must have made it.

    Raises:
        PrivacyError: not an `Update`, of another site, other names or shapes, not floating point, NaN or infinite, or
            a weight, steps, metrics, spent privacy, size or time that is none.
    """
    if not isinstance(update, Update):
        raise PrivacyError(f"expected an Update from {site}, got {type(update).__name__}; a technique's protect() "
                           "returns the update it was given, changed with update.map(...)")
    if not isinstance(update.site, str) or update.site != site:
        raise PrivacyError(f"expected an update of {site}, got one that says it is of {_shown(update.site)!r}")
    if not isinstance(update.delta, Mapping) or update.delta.keys() != like.keys():
        odd = [_shown(name) for name in update.delta.keys() ^ like.keys()] if isinstance(update.delta, Mapping) else []
        raise PrivacyError(f"the update of {site} has other tensors than the model: {sorted(odd)[:3] or 'no names'}")
    for name, tensor in update.delta.items():
        _check_tensor(tensor, like[name], f"the update of {site} has {name}")
    for what, value, right, expected in (
        ("weight", update.weight, _number(update.weight) and update.weight > 0, "a positive number"),
        ("steps", update.steps, _count(update.steps), "a count"),
        ("seconds", update.seconds, _number(update.seconds) and update.seconds >= 0, "a number of seconds"),
        ("encoded", update.encoded, update.encoded is None or (_count(update.encoded) and update.encoded > 0),
         "a count of bytes or None"),
        ("round", update.round, update.round is None or _count(update.round), "a round's number or None"),
        ("metrics", update.metrics, isinstance(update.metrics, Mapping) and all(
            isinstance(k, str) and (_number(v) or (isinstance(v, float) and math.isnan(v)))
            for k, v in update.metrics.items()), "numbers by name"),
        ("spent", update.spent, isinstance(update.spent, tuple) and all(map(_is_spent, update.spent)),
         "statements of privacy spent"),
    ):
        if not right:
            raise PrivacyError(f"the update of {site} has {what} {_shown(value)}, expected {expected}")
    return update


def _check_tensor(tensor: object, like: torch.Tensor, what: str) -> None:
    if not isinstance(tensor, torch.Tensor) or tensor.dtype not in _FLOATS or tensor.layout is not torch.strided:
        raise PrivacyError(f"{what} as something other than a dense floating point tensor")
    if tensor.shape != like.shape:
        raise PrivacyError(f"{what} of shape {tuple(tensor.shape)}, expected {tuple(like.shape)}")
    if tensor.is_meta or tensor.requires_grad:
        raise PrivacyError(f"{what} {'without values' if tensor.is_meta else 'with its history of gradients'}; send "
                           "plain values, such as tensor.detach()")
    # A float64 may be finite and yet infinite in the model.
    if not torch.isfinite(tensor.to(like.dtype)).all():
        raise PrivacyError(f"{what} with NaN or infinite values")


def _number(value: object) -> bool:
    """A number that can be reckoned with in float64."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -_LARGEST < value < _LARGEST


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_spent(value: object) -> bool:
    return (isinstance(value, Spent) and (_number(value.epsilon) or value.epsilon == math.inf) and value.epsilon >= 0
            and _number(value.delta) and 0 <= value.delta <= 1 and value.unit in ("patient", "site")
            and isinstance(value.accountant, str) and isinstance(value.adjacency, str))


def _shown(value: object) -> str:
    """What came, in a few words, whatever it is."""
    try:
        return str(value)[:80]
    except Exception as error:
        return f"a {type(value).__name__} that can't be written out ({type(error).__name__})"


def importable(technique: Privacy) -> tuple[str, ...]:
    """Whether another machine can make this technique; a remote engine asks before it sends one.

    Returns:
        Names of the modules beyond fedlab that hold its classes and functions: every site must have them.

    Raises:
        PrivacyError: something of it is defined in a notebook cell, in a script that was started, or in a function,
            from where no other process can import it.
    """
    modules = set()
    for layer in technique._layers():
        for part in _parts(layer):
            module, name = getattr(part, "__module__", None), getattr(part, "__qualname__", "")
            if module == "builtins":
                continue
            found: Any = sys.modules.get(module or "")
            for step in name.split("."):
                found = getattr(found, step, None)
            if module == "__main__" or found is not part:
                raise PrivacyError(
                    f"{name or repr(part)} of {layer!r} is defined in a notebook, a script or a function, from where "
                    "other sites cannot import it: write it into a file (fedlab export technique, or %%writefile "
                    "my_technique.py as the first line of its cell), have that file approved at every site, and import "
                    "it from there")
            modules.add(module or "")
    return tuple(sorted(name for name in modules if name.partition(".")[0] != "fedlab"))


def _parts(value: Any) -> Iterator[Any]:
    """The classes and functions that an object is made of, those in its settings included."""
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        yield value
        return
    yield type(value)
    if isinstance(value, Mapping):
        inner = list(value.values())
    elif isinstance(value, list | tuple | set | frozenset):
        inner = list(value)
    elif is_dataclass(value):
        inner = [getattr(value, f.name) for f in fields(value)]
    else:
        inner = [v for k, v in vars(value).items() if not k.startswith("_")] if isinstance(value, Privacy) else []
    for item in inner:
        yield from _parts(item)
