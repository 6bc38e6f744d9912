"""The live objects of a site that failed, kept for debugging."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from typing import NoReturn

import torch

from fedlab.core.errors import FedlabError, PrivacyError
from fedlab.core.kit import Kit
from fedlab.core.types import Tensors
from fedlab.core.weights import load_weights, trainable
from fedlab.run.site_errors import kind_of
from fedlab.run.site_task import SiteWork

__all__ = ["FailedSite"]


@dataclass(kw_only=True, eq=False, repr=False)
class FailedSite(SiteWork):
    """The live objects of a site at the moment at which it failed.

    They hold the site's patients, so they stay in this process: they cannot be copied or pickled. Under a privacy
    guarantee a notebook does not show the text of the exception, since it is saved with its outputs; `traceback` has
    it.

    Attributes:
        error: as the server sees it; the first exception is chained to it. For a debugger:
            `import pdb; pdb.post_mortem(failed.cause.__traceback__)`.
        weights: of the model at the failure, and its buffers. The model itself serves the next site: see `restore`.
    """

    error: FedlabError
    weights: Tensors

    @classmethod
    def of(cls, error: FedlabError) -> FailedSite:
        """The objects that an error carries.

        Raises:
            ValueError: the error carries none, such as an error of another process.
        """
        work = error.work
        if work is None:
            raise ValueError(f"{error!r} carries no objects of a site; only errors raised in this process do")
        weights = {} if work.kit is None else {
            name: t.detach().cpu().clone() for name, t in (*trainable(work.trainer.model).items(),
                                                           *work.trainer.model.named_buffers())}
        return cls(**{**vars(work), "site_state": work.site_state.copy()}, error=error, weights=weights)

    @property
    def round(self) -> int:
        """Number of the round, counted from 0."""
        return self.state.round

    @property
    def batch(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Images and regions of the last batch drawn."""
        return None if self.kit is None else self.kit.batch

    @property
    def cause(self) -> BaseException:
        """The first exception."""
        first: BaseException = self.error
        while first.__cause__ is not None:
            first = first.__cause__
        return first

    @property
    def traceback(self) -> str:
        """The whole text of the exception, as Python prints it."""
        return "".join(traceback.format_exception(self.error))

    def restore(self) -> Kit:
        """The kit with the weights of the failure, such as for `failed.restore().loss(*failed.batch)`.

        Raises:
            ValueError: the site failed before it had a kit.
        """
        if self.kit is None:
            raise ValueError(f"{self.site.name} failed at stage {self.stage!r}, before there was a model to train; "
                             "see error and site_state")
        model = getattr(self.kit.model, "_module", self.kit.model)  # a technique may have wrapped it
        load_weights(model, self.weights)
        return self.kit

    def __reduce__(self) -> NoReturn:
        raise PrivacyError(f"a FailedSite of {self.site.name} holds its patients and stays in this process; copy out "
                           "the numbers that you need")

    def _rows(self) -> Iterator[tuple[str, str]]:
        yield "failed in", f"round {self.round}, stage {self.stage!r}"
        yield "exception", (f"{kind_of(self.cause)}; under a guarantee its text is not shown, see .traceback"
                            if self.guarded else f"{type(self.cause).__name__}: {self.cause}")
        if self.kit is not None:
            yield "kit", f"{type(self.kit.model).__name__} on {self.kit.device}, {len(self.weights)} tensors of weights"
        if self.batch is not None:
            yield "batch", " and ".join(f"{'×'.join(map(str, t.shape))} {str(t.dtype).removeprefix('torch.')}"
                                        for t in self.batch)
        yield "site state", ", ".join(self.site_state.namespaces) or "empty"

    def __repr__(self) -> str:
        return f"<FailedSite {self.site.name}: {'; '.join(f'{name}: {what}' for name, what in self._rows())}>"

    def _repr_html_(self) -> str:
        rows = "".join(f'<tr><th style="text-align:left">{escape(name)}</th>'
                       f'<td style="text-align:left">{escape(what)}</td></tr>' for name, what in self._rows())
        more = "" if self.guarded else f"<details><summary>traceback</summary><pre>{escape(self.traceback)}</pre>" \
                                       "</details>"
        return f"<p><b>{escape(self.site.name)}</b> failed</p><table>{rows}</table>{more}"
