"""What a forward pass leaves behind in a network, and whether it mixes patients: found by trying, with bold probes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from fedlab.core.kit import Kit
from fedlab.core.types import MODALITIES, REGIONS
from fedlab.privacy.dp.contents import contents, copied, leaves

__all__ = ["leaks", "probe_copy", "probes"]

#: The output for a patient may differ by this share of its norm with the others of a batch, which is rounding: where
#: float32 is all that the network takes, where it is looked at again in float64, and there.
_TOLERANCE, _SUSPICIOUS, _EXACT = 1e-3, 1e-5, 1e-6
Group = list[tuple[str, int]]


def probes(size: tuple[int, int, int], *, few: bool) -> dict[str, torch.Tensor]:
    """Pairs of patients, shape (2, 4, X, Y, Z): ordinary ones, and some that a branch in a network may treat apart.

    Args:
        size: of their images.
        few: give one patient of each kind but the ordinary, to save time.
    """
    rng = torch.Generator().manual_seed(0)

    def noise() -> torch.Tensor:
        return torch.randn(2, len(MODALITIES), *size, generator=rng)

    levels, ordinary = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1, 1), noise()
    found = {"ordinary": ordinary, "large": 1e3 * noise(), "bright": 1e3 * (2 + noise().clamp(-1, 1)),
             "negative": -50 * (2 + noise().clamp(-1, 1)), "tiny": 1e-5 * noise(), "one bright voxel": 0.1 * noise(),
             "constant": torch.ones_like(ordinary) * levels, "empty": torch.zeros_like(ordinary)}
    found["one bright voxel"][:, :, size[0] // 2, size[1] // 3, size[2] // 2] = 1e4 * levels.view(2, 1)
    return {kind: pair[:1] if few and kind != "ordinary" else pair for kind, pair in found.items()}


def probe_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in training on the CPU, without the randomness of dropout."""
    probe: nn.Module = copied(model).cpu().to(dtype).train()
    for layer in probe.modules():
        if isinstance(layer, nn.modules.dropout._DropoutNd):
            layer.p = 0.0
    return probe


class _Passes:
    """A copy of a network and its loss that batches go through one by one, each with the same random numbers."""

    def __init__(self, model: nn.Module, loss: Any, dtype: torch.dtype) -> None:
        unused: Any = None
        self.probe, self.loss, self.dtype, self.output = probe_copy(model, dtype), copied(loss), dtype, unused
        self.kit = Kit(model=unused, optimiser=unused, loader=(), patients=unused, objective=self.loss,
                       device=torch.device("cpu"), dtype=torch.float32, seed=0, backward=unused)
        self.kit.model = self._through  # type: ignore[assignment]

    def _through(self, image: torch.Tensor) -> Any:
        self.output = self.probe(image)
        return self.output

    def __call__(self, image: torch.Tensor, *, train: bool = True) -> Any:
        """The output for a batch; its loss is computed too, since a loss may keep something."""
        torch.default_generator.manual_seed(0)  # all generators would also change those of GPUs
        self.probe.train(train)
        image = image.to(self.dtype)
        target = (image[:, :1] > image[:, :1].mean()).float().expand(-1, len(REGIONS), *image.shape[2:])
        self.kit.loss(image, target)
        return self.output

    def weights(self) -> dict[str, tuple[str, torch.Tensor]]:
        """Copies of parameters and buffers by name, and which of the two each is."""
        return {**{name: ("parameter", p.detach().clone()) for name, p in self.probe.named_parameters()},
                **{name: ("buffer", b.clone()) for name, b in self.probe.named_buffers()}}

    def held(self) -> dict[str, str]:
        """Everything that the network and the loss hold."""
        return contents(self.probe, self.loss)

    def detached(self) -> dict[str, str]:
        """The same without activations that are attached to the graph of a pass."""
        graph = {name for where, root in (("", self.probe), ("loss", self.loss)) for name, t in leaves(root, where)
                 if isinstance(t, torch.Tensor) and not t.is_leaf}
        return {name: text for name, text in self.held().items() if name not in graph}


def leaks(model: nn.Module, loss: Any, pairs: dict[str, torch.Tensor]) -> list[str]:
    """What passes in training or evaluation set from patients; if nothing, whether one mixes the patients of a batch.

    An activation that stays attached to its graph until the next pass replaces it, as MONAI's DynUNet keeps those for
    deep supervision, is not counted as kept.
    """
    with torch.no_grad():
        passes, first = _first(model, loss, pairs["ordinary"])
        weights, held = passes.weights(), passes.held()
        try:
            mixing = _mixed(passes, pairs)
        except _NoLogits as error:
            return [str(error)]
        passes(torch.cat([pair[:1] for pair in pairs.values()]), train=False)
        again = passes(pairs["ordinary"])
        passes(pairs["large"][:1])  # not the patients of the first pass: what is replaced by every pass differs too
    now = passes.weights()
    changed = [f"{name} leaks: a pass in training changes this {kind}, which keeps data of patients without noise"
               for name, (kind, t) in weights.items() if name not in now or not torch.equal(t, now[name][1])]
    remembers = not changed and (held != passes.held() or _apart(first, again, _EXACT))
    kept = _remembered(model, loss, pairs) if remembers else changed
    return kept or _confirmed(model, loss, pairs, mixing)


class _After(NamedTuple):
    """A copy after many passes, and after a last one on patients that are always the same."""

    detached: dict[str, str]  # what it holds, without activations that are attached to the graph of a pass
    held: dict[str, str]  # after the last pass
    output: Any


def _first(model: nn.Module, loss: Any, ordinary: torch.Tensor) -> tuple[_Passes, Any]:
    """A copy that is fresh, and the output of another's first pass: in float32, the faster one, if the network can."""
    try:
        return _Passes(model, loss, torch.float32), _Passes(model, loss, torch.float32)(ordinary)
    except (RuntimeError, ValueError):
        return _Passes(model, loss, torch.float64), _Passes(model, loss, torch.float64)(ordinary)


def _remembered(model: nn.Module, loss: Any, pairs: dict[str, torch.Tensor]) -> list[str]:
    """What passes set from patients: it differs between copies that went through as many passes on other patients."""
    batches = [batch for _, batch in _batches(pairs)]
    others = [torch.randn(batch.shape, generator=torch.Generator().manual_seed(1 + number))
              for number, batch in enumerate(batches)]
    one, other = (_after(model, loss, chosen, pairs["ordinary"]) for chosen in (batches, others))
    names = sorted(_different(one.detached, other.detached) | _different(one.held, other.held))
    if names:
        more = f"; so does {', '.join(names[1:4])}" if len(names) > 1 else ""
        return [f"{names[0]} leaks: a pass sets it from the patients, and later passes may use it{more}"]
    return ["the network leaks: its output depends on the patients of earlier passes"] if _apart(
        one.output, other.output, _EXACT) else []


def _after(model: nn.Module, loss: Any, batches: Sequence[torch.Tensor], last: torch.Tensor) -> _After:
    passes, _ = _first(model, loss, last)
    for train, chosen in ((True, batches), (False, batches), (True, batches[:1])):
        for batch in chosen:
            passes(batch, train=train)
    return _After(detached=passes.detached(), output=passes(last), held=passes.held())


def _different(one: dict[str, str], other: dict[str, str]) -> set[str]:
    return {name.rstrip(":") or "the network" for name in one.keys() | other.keys()
            if one.get(name) != other.get(name)}


def _batches(pairs: dict[str, torch.Tensor]) -> list[tuple[Group, torch.Tensor]]:
    """Batches of patients by kind and place: two of a kind, one of each, and three or two that differ."""
    groups: list[Group] = [
        *([(kind, 0), (kind, 1)] for kind, pair in pairs.items() if len(pair) == 2), [(kind, 0) for kind in pairs],
        [("ordinary", 0), ("ordinary", 1), ("large", 0)], [("tiny", 0), ("ordinary", 1)]]
    return [(group, torch.stack([pairs[kind][k] for kind, k in group])) for group in groups]


def _mixed(passes: _Passes, pairs: dict[str, torch.Tensor]) -> list[Group]:
    """Batches in which the output for a patient, the first of a pair, is another than alone; that patient first."""
    alone = {(kind, k): passes(pair[k:k + 1]) for kind, pair in pairs.items()
             for k in range(2 if kind == "ordinary" else 1)}
    found = []
    for group, batch in _batches(pairs):
        together = passes(batch)
        if not isinstance(together, torch.Tensor) or together.shape != (len(batch), *alone["ordinary", 0].shape[1:]):
            raise _NoLogits(f"the network gives {type(together).__name__}, expected logits (B, 3, X, Y, Z)")
        off = [one for out, one in zip(together, group, strict=True)
               if one in alone and _apart(out[None], alone[one], _SUSPICIOUS)]
        if off:
            found.append([off[0], *(one for one in group if one != off[0])])
    return found


def _confirmed(model: nn.Module, loss: Any, pairs: dict[str, torch.Tensor], suspicious: list[Group]) -> list[str]:
    """The first of these batches that mixes patients in float64 too, so that no rounding is taken for it."""
    if not suspicious:
        return []
    with torch.no_grad():
        passes, limit = _Passes(model, loss, torch.float64), _EXACT
        try:
            passes(pairs["ordinary"][:1])
        except (RuntimeError, ValueError):
            passes, limit = _Passes(model, loss, torch.float32), _TOLERANCE
        for group in suspicious:
            batch = torch.stack([pairs[kind][k] for kind, k in group])
            if _apart(passes(batch)[:1], passes(batch[:1]), limit):
                kinds = list(dict.fromkeys(kind for kind, _ in group))
                about = "" if kinds == ["ordinary"] else f"; seen with patients that are {', '.join(kinds)}"
                return [f"the network mixes patients: the output for one depends on the others in the batch{about}"]
    return []


def _apart(one: Any, other: Any, limit: float) -> bool:
    """Whether two outputs, or lists of them, differ by more than a share of their norm, or than float32 can tell."""
    if isinstance(one, list | tuple):
        return len(one) != len(other) or any(_apart(a, b, limit) for a, b in zip(one, other, strict=True))
    if one.dtype is torch.float64 and torch.equal(one.float().double(), one):
        limit = _TOLERANCE  # float32 inside
    usable = torch.isfinite(other)
    gap, size = (t[usable].norm() for t in (one - other, other))
    return not bool(gap <= limit * size + 1e-9)


class _NoLogits(Exception):
    """The network gives something other than logits."""
