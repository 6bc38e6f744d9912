"""What a site notes for its own eyes is tensors; anything else is refused where it is set."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from cohorts import blob_sites
from fedlab.core.errors import SiteError
from fedlab.core.types import SiteState
from fedlab.privacy.base import Privacy
from fedlab.run.federate import federate
from trainers import trainer


def test_diagnostics_are_tensors_by_name():
    state = SiteState(diagnostics={"a": torch.ones(1)})
    view = state.of("privacy")
    view.diagnostics["b"] = torch.zeros(2)
    view.diagnostics.update({"c": torch.zeros(1)})
    assert set(state.diagnostics) == {"a", "b", "c"}
    for other in (state, state.copy(), copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        for change in (lambda d: d.update(x=0.5), lambda d: d.__setitem__("x", [1]), lambda d: d.__setitem__(3, d["a"]),
                       lambda d: d.setdefault("x", 1.0)):
            with pytest.raises(TypeError, match=r"diagnostics are tensors by name.*set torch\.tensor"):
                change(other.diagnostics)
        assert other.diagnostics.setdefault("a", torch.zeros(1)).equal(torch.ones(1))
    assert set(state.diagnostics) == {"a", "b", "c"}


def test_a_technique_that_notes_a_number_fails_there():
    class Notes(Privacy):
        def protect(self, update, state, rng):
            state.diagnostics["norm"] = update.norm()
            return update

    with pytest.raises(SiteError, match="stage 'protect': TypeError: diagnostics are tensors by name, got float"):
        federate(trainer(), blob_sites(), privacy=Notes(), rounds=1, progress=False)
