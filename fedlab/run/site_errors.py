"""What a server is told of an error at a site: site, round and stage, and a text only if it cannot quote patients.

The text of an exception may quote scans, losses or names of patients, whatever its type, and so may the name of its
class, its notes and the exceptions that it is chained to. Under a guarantee none of it leaves the site, unless fedlab
itself has written the text, about settings, ledgers or messages. The whole stays at the site: in its log, or in the
exception that the engine of one machine raises. Paths leave no site, with or without a guarantee.
"""

from __future__ import annotations

from collections.abc import Iterator

from fedlab.core.errors import FedlabError, PrivacyBudgetExhausted, PrivacyError, RunError, SiteError
from fedlab.core.text import without_folders

__all__ = ["as_site_error", "kind_of", "own_text", "reason_of", "whole_text"]

#: Modules whose messages are about settings, ledgers, keys and messages; they quote no patient.
_OWN = ("fedlab.privacy.", "fedlab.deploy.", "fedlab.run.")
_STAGES = frozenset({"ledger", "equip", "fit", "protect", "check", "remember", "exchange", "reach", "begin", "keep"})
_STAYS = "the reason stays at the site"


def kind_of(error: BaseException) -> str:
    """The name of the nearest class of an error that Python or fedlab defines: others may be named after data."""
    return next(kind.__name__ for kind in type(error).__mro__ if kind.__module__.partition(".")[0] in
                ("builtins", "fedlab"))


def own_text(error: BaseException) -> str | None:
    """The text of an error that fedlab has written about settings, ledgers or messages; else None.

    It is known by the type and by the module that has raised it: code of a technique, a trainer or a reader of scans
    can raise the same types.
    """
    trace = error.__traceback__
    if type(error) not in (PrivacyError, PrivacyBudgetExhausted, RunError) or trace is None:
        return None
    while trace.tb_next is not None:
        trace = trace.tb_next
    module = str(trace.tb_frame.f_globals.get("__name__"))
    return str(error) if module.startswith(_OWN) else None


def as_site_error(error: Exception, *, site: str, round: int, stage: str, guarded: bool) -> FedlabError:
    """The error of a site at work. An engine of this machine may raise it; what a server records is its `told`."""
    own, told = own_text(error), ""
    raised: FedlabError
    if isinstance(error, PrivacyBudgetExhausted):  # its text is the reason of a withdrawal
        told = f"{site} takes no part in round {round}: {own or _STAYS}"
        raised = PrivacyBudgetExhausted(without_folders(
            told if guarded else f"{site} takes no part in round {round}: {error}"))
    elif isinstance(error, PrivacyError):
        told = f"round {round}, {site}, {stage}: {own}; nothing was sent" if own else ""
        raised = PrivacyError(f"round {round}, {site}, {stage}: {error}; nothing was sent")
    elif isinstance(error, FedlabError):
        raised = error
    else:
        raised = SiteError(site, round, stage, without_folders(f"{type(error).__name__}: {error}"))
    raised.stage, raised.told = stage, told
    return raised


def reason_of(error: Exception, *, guarded: bool) -> str:
    """Why a site has failed, as a server records it; `guarded` says whether a guarantee covers the run."""
    if not guarded:
        return without_folders(str(error))
    told, stage = getattr(error, "told", None), getattr(error, "stage", "")
    at = f" at stage {stage!r}" if stage in _STAGES else ""
    return without_folders((own_text(error) if told is None else str(told))
                           or f"it failed{at}; under a guarantee {_STAYS}")


def whole_text(error: BaseException) -> str:
    """Everything that an error says, with its notes and what it is chained to: for the site's own log."""
    said: list[str] = []
    for part in _chain(error):
        if not any(part in earlier for earlier in said):
            said.append(part)
    return "; ".join(said)


def _chain(error: BaseException) -> Iterator[str]:
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield f"{type(following).__name__}: {following}"
        yield from map(str, getattr(following, "__notes__", ()))
        following = following.__cause__ or following.__context__
