"""Buffers of a network, such as the running statistics of batch norm: which of them training moves."""

from __future__ import annotations

import copy
from functools import cached_property

import torch
from torch import nn

from fedlab.core.global_generators import seeded
from fedlab.core.hardware import calling, precision_for
from fedlab.core.protocols import Run
from fedlab.core.seeds import generator
from fedlab.core.types import MODALITIES, MOMENT

__all__ = ["Buffers", "check_buffers"]


class Buffers:
    """The buffers of a network as they are now.

    Args:
        model: maps images (B, 4, x, y, z) to logits.
        crop: size in voxels that it is trained with.
    """

    def __init__(self, model: nn.Module, *, crop: tuple[int, int, int]) -> None:
        self.model, self.crop = model, crop
        self.start = self._present()

    @cached_property
    def moving(self) -> dict[str, torch.Tensor]:
        """Those of all modules in which a pass in training changes a buffer, found out once, on a copy.

        Raises:
            ValueError: the network fails on two crops of random numbers, or a complex buffer moves.
        """
        if not self.start:
            return {}
        probe = copy.deepcopy(self.model).train()
        device = next(iter(probe.buffers())).device
        dtype, before = precision_for(probe, "auto", device), self._present()
        image = torch.randn(2, len(MODALITIES), *self.crop, generator=generator(0, "moving buffers")).to(device)
        try:
            with seeded(0, device), torch.no_grad(), calling(device, dtype):
                probe(image.double() if dtype is torch.float64 else image)
        except Exception as error:  # whatever the network's own code raises
            raise ValueError(f"the network fails in training on two crops of {self.crop} voxels "
                             f"({type(error).__name__}: {error}), so it is not known which of its buffers training "
                             "moves") from error
        modules = {_module(name) for name, b in probe.named_buffers() if not torch.equal(b.cpu(), before[name])}
        for name, buffer in before.items():
            if _module(name) in modules and buffer.is_complex():
                raise ValueError(f"training moves the complex buffer {name}; fedlab averages real numbers only")
        return {name: buffer for name, buffer in self.start.items() if _module(name) in modules}

    def moved(self) -> dict[str, torch.Tensor]:
        """The moving ones as they are now, after training.

        Raises:
            ValueError: another one has moved.
        """
        now = self._present()
        for name in now.keys() - self.moving.keys():
            if not torch.equal(now[name], self.start[name]):
                raise ValueError(f"training has changed the buffer {name}, which a first pass in training left as it "
                                 "was; such a buffer cannot be federated: make it a parameter")
        return {name: now[name] for name in self.moving}

    def _present(self) -> dict[str, torch.Tensor]:
        return {name: b.detach().cpu().clone() for name, b in self.model.named_buffers()}


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def check_buffers(run: Run) -> None:
    """Raises `ValueError` where sites send buffers to parts that protect or judge weights only."""
    if not (names := [name for name in run.trainer.initial_buffers() if not name.startswith(MOMENT)]):
        return
    bounded = run.admission is not None and run.admission.max_norm is not None
    for refuses, part in ((bool(run.privacy.units or run.privacy.works_at_server), run.privacy),
                          (bool(run.aggregation.units) or run.aggregation.hides_updates, run.aggregation),
                          (not getattr(run.strategy, "takes_buffers", True), run.strategy), (bounded, run.admission)):
        if refuses:
            raise ValueError(f"training moves buffers of the network, such as {names[0]}, which {part!r} does not "
                             "cover: use group norm (fedlab.privacy.dp.validators.fix_private), or leave buffers at "
                             "the sites with SiteTrainer(buffers='keep')")
