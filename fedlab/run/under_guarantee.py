"""The last step before an update leaves a site under a guarantee: values only, and what its ledger says is spent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fedlab.core.errors import PrivacyError
from fedlab.core.types import Tensors, Update
from fedlab.privacy.accounting.ledger import Ledger
from fedlab.privacy.aggregation import Aggregation
from fedlab.privacy.base import Privacy

__all__ = ["under_guarantee"]


def under_guarantee(update: Update, like: Tensors, ledger: Ledger, parts: Sequence[Privacy | Aggregation]) -> Update:
    """The update as it leaves a site: with the privacy spent, and without anything that no guarantee covers.

    Numbers that no technique declares, such as the loss, stay at the site. Tensors are new ones in the order of the
    model: a view shares its memory with what it was taken from, a tensor has strides and attributes, and -0.0, as of a
    negative number times 0, tells a sign; none of that has noise.

    Args:
        update: that passed `check_update`.
        like: the tensors of the model.
        ledger: of the site.
        parts: the techniques and the aggregation.

    Raises:
        PrivacyError: a part promises a guarantee for which nothing was charged in this round.
    """
    for part in parts:
        unpaid = sorted(unit for unit in part.units if not ledger.charged(unit))  # type: ignore[arg-type]
        if unpaid:
            raise PrivacyError(f"{part!r} promises a guarantee per {' and per '.join(unpaid)} but entered nothing into "
                               "the ledger; charge it in equip() or protect()")
    sends = frozenset[str]().union(*(part.sends for part in parts if isinstance(part, Privacy)))
    return replace(update, spent=ledger.spent(), metrics={n: v for n, v in update.metrics.items() if n in sends},
                   delta={name: (update.delta[name].detach() + 0.0).contiguous() for name in like})
