"""Whether something other than fedlab, such as `load_state_dict`, has changed a model."""

from __future__ import annotations

import weakref

from torch import nn

__all__ = ["changed_elsewhere", "note_versions"]

#: Versions of the tensors of each model, as torch counts changes in place, after fedlab last changed them.
_VERSIONS: weakref.WeakKeyDictionary[nn.Module, list[int]] = weakref.WeakKeyDictionary()


def note_versions(model: nn.Module) -> None:
    """Notes that the model's present values are fedlab's own."""
    _VERSIONS[model] = _versions(model)


def changed_elsewhere(model: nn.Module) -> bool:
    """Whether the model has changed since `note_versions`; a model that is not known has not."""
    return _VERSIONS.get(model, current := _versions(model)) != current


def _versions(model: nn.Module) -> list[int]:
    return [0 if t.is_inference() else t._version for t in (*model.parameters(), *model.buffers())]
