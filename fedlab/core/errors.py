"""The errors that fedlab raises; each says what was expected, what was given and what to do."""

from __future__ import annotations

from typing import Any

__all__ = ["DataError", "FedlabError", "PrivacyBudgetExhausted", "PrivacyError", "RunError", "SiteError"]


class FedlabError(Exception):
    """Base of every error that fedlab itself raises.

    Attributes:
        work: the live objects of the site that failed (`fedlab.run.site_task.SiteWork`), or None. They hold the site's
            patients, so they stay in this process: a pickled error is without them.
        stage: what the site was doing, as in `SiteError`.
        told: what a server may know of it under a guarantee; see `fedlab.run.site_errors`.

    Example:
        >>> fl.read_cohort("no/such/folder")
        Traceback (most recent call last):
        fedlab.core.errors.DataError: no/such/folder is not a folder; ...
    """

    work: Any = None
    stage: str = ""
    told: str | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self.args, {name: value for name, value in vars(self).items() if name != "work"}


class DataError(FedlabError, ValueError):
    """Scans, labels or tables that cannot be used as they are.

    Attributes:
        code: a stable word for what is wrong, such as "truncated"; see `fedlab.data.readers.findings.CODES`.
    """

    def __init__(self, message: str = "", *, code: str = "unusable") -> None:
        super().__init__(message)
        self.code = code


class PrivacyError(FedlabError):
    """A privacy mechanism cannot give its guarantee; nothing was sent.

    Example:
        >>> class Forgetful(fl.Privacy):
        ...     units = frozenset({"site"})  # claims a guarantee, gives none
        >>> fl.check_privacy(Forgetful())
        Traceback (most recent call last):
        fedlab.core.errors.PrivacyError: ...
    """


class PrivacyBudgetExhausted(PrivacyError):
    """A site would exceed its privacy budget and takes no further part; its earlier releases count."""


class RunError(FedlabError):
    """A run directory or a saved model is missing, damaged, of another run, or would be overwritten."""


class SiteError(FedlabError):
    """A site failed while it worked on a round.

    Attributes:
        site: name of the site.
        round: number of the round, counted from 0.
        stage: "ledger", "equip", "fit", "protect", "check" or "remember"; "exchange" of messages with other sites;
            "reach" where the site could not be reached or was lost while it worked.
    """

    def __init__(self, site: str, round: int, stage: str, reason: str) -> None:
        super().__init__(f"site {site!r} failed in round {round} at stage {stage!r}: {reason}")
        self.site, self.round, self.stage, self.reason = site, round, stage, reason

    def __reduce__(self) -> tuple[Any, ...]:
        left = {name: value for name, value in vars(self).items() if name != "work"}
        return SiteError, (self.site, self.round, self.stage, self.reason), left  # survives worker processes

    def in_round(self, round: int) -> SiteError:
        """The same failure in the round in which the server has noticed it; a site may not know it."""
        if round == self.round:
            return self
        error = SiteError(self.site, round, self.stage, self.reason)
        error.__cause__, error.told = self.__cause__, self.told
        return error
