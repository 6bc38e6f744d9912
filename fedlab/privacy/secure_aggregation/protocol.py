"""The messages of secure aggregation, and when a site refuses (Bonawitz et al. 2017).

Five exchanges, each by way of the server: every site publishes its keys ("keys"), splits its secrets into shares, one
for each peer, sealed ("shares"), and opens the shares it receives ("receive"). It then sends its masked update. The
server names the survivors, who confirm to each other that all were given the same names ("agree"), and then reveal,
for each peer, either the share of its own mask or the share of its mask key, never both ("unmask").

The notes of a site are its `SiteState.secrets`, which are never written to disk; its keys are deleted once it has
answered. Of each round it remembers which sum it has helped to unmask, and helps with no other: the difference of two
sums would be the update of a site that is in one of them only. More than half of the sites help with a sum, so of any
two sums at least one site knows both. The functions of a site come first, those of the server after them.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedlab.core.errors import PrivacyError
from fedlab.core.types import Messages
from fedlab.privacy.secure_aggregation import crypto
from fedlab.privacy.secure_aggregation.crypto import KEY_BYTES, SHARE_BYTES

__all__ = ["agree", "collect_answers", "collect_keys", "hand_on_shares", "mask_keys", "name_survivors", "publish_keys",
           "receive_shares", "reveal", "share_secrets", "unmask_keys"]

#: What one party knows in a round, kept in memory only. A step that refuses changes nothing.
Notes = dict[str, Any]
_Inbox = Mapping[str, bytes]
_SERVER = "server"


def publish_keys(site: str, notes: Notes) -> _Inbox:
    """First exchange: new secrets for this round; those of another round are deleted."""
    own = {"seal": crypto.new_key(), "mask": crypto.new_key(), "self": secrets.token_bytes(KEY_BYTES)}
    _forget(notes, stage="keys", own=own)
    return {_SERVER: _published(own)}


def share_secrets(site: str, inbox: _Inbox, notes: Notes, *, threshold: int, sites: int) -> _Inbox:
    """Second exchange: sealed shares of this site's secrets, one for each peer, from the public keys of all sites.

    Raises:
        PrivacyError: the keys are not those of `threshold` to `sites` sites with this one among them.
    """
    _expect(notes, "keys", site)
    own = notes["own"]
    if inbox.get(site) != _published(own):
        raise PrivacyError(f"{site} does not find its own keys among those that the server distributes; its peers "
                           "would seal their messages for another recipient")
    if not threshold <= len(inbox) <= sites or any(len(keys) != 3 * KEY_BYTES for keys in inbox.values()):
        raise PrivacyError(f"{site} expected the keys of {threshold} to {sites} sites, got {len(inbox)} messages of "
                           f"{sorted({len(keys) for keys in inbox.values()})} bytes")
    roster = {name: inbox[name] for name in sorted(inbox)}
    of_mask = crypto.split_secret(own["mask"], threshold=threshold, count=len(roster))
    of_self = crypto.split_secret(own["self"], threshold=threshold, count=len(roster))
    shares = dict(zip(roster, map(bytes.__add__, of_mask, of_self), strict=True))
    notes.update(stage="shares", roster=roster, shares={site: shares[site]})
    return {peer: crypto.seal(_seal_key(notes, peer), shares[peer], about=_about("share", site, peer))
            for peer in shares if peer != site}


def receive_shares(site: str, inbox: _Inbox, notes: Notes, *, threshold: int) -> _Inbox:
    """Third exchange: the peers' shares are opened and kept. The sites that sent one are the members of this round.

    Raises:
        PrivacyError: fewer than `threshold` members, or a share that was changed on its way.
    """
    _expect(notes, "shares", site)
    _known(inbox, notes["roster"].keys() - {site}, f"{site} received shares of sites whose keys it does not know")
    _enough(len(inbox) + 1, threshold, "sites shared their secrets")
    shares = dict(notes["shares"])
    for peer, sealed in inbox.items():
        shares[peer] = crypto.unseal(_seal_key(notes, peer), sealed, about=_about("share", peer, site))
        if len(shares[peer]) != 2 * SHARE_BYTES:
            raise PrivacyError(f"{peer} sent {site} shares of {len(shares[peer])} bytes, expected {2 * SHARE_BYTES}")
    notes.update(stage="ready", shares=shares)
    return {}


def mask_keys(site: str, notes: Notes, *, round: int, shown: str, update: bytes) -> list[tuple[bytes, int]]:
    """Keys and signs of the streams that hide this site's update: its own, and one shared with each other member.

    Args:
        site, notes: of the site.
        round: number of the round.
        shown: identifies the state that the site was shown; masks of sites that were shown others do not cancel.
        update: identifies the update.

    Raises:
        PrivacyError: no masks are agreed, or they have been used: two updates under one mask reveal their difference.
    """
    _expect(notes, "ready", site)
    own, context = notes["own"], _context(notes["roster"], shown)
    keys = [(crypto.derive_key(own["self"], purpose="self"), 1)]
    for peer in sorted(notes["shares"].keys() - {site}):
        public = _keys_of(notes["roster"][peer])["mask"]
        keys.append((crypto.pair_key(own["mask"], public, purpose="mask", context=context), 1 if site < peer else -1))
    notes.update(stage="masked", round=round, shown=shown, update=update)
    return keys


def agree(site: str, inbox: _Inbox, notes: Notes, *, threshold: int) -> _Inbox:
    """Fourth exchange: the survivors, as the server named them to this site, repeated to each of them under seal.

    Raises:
        PrivacyError: the list names others than members, lacks this site or has fewer than `threshold` names.
    """
    _expect(notes, "masked", site)
    try:
        survivors = json.loads(inbox[_SERVER])
        known = survivors == sorted(set(survivors)) and site in survivors and set(survivors) <= notes["shares"].keys()
    except (KeyError, TypeError, ValueError) as error:
        raise PrivacyError(f"{site} expected a list of survivors from the server, got none ({error})") from error
    if not known:
        raise PrivacyError(f"{site} refuses a list of survivors that lacks it or names others than this round's "
                           f"members: {survivors}")
    _enough(len(survivors), threshold, "sites survived")
    notes.update(stage="agreed", survivors=survivors)
    return {peer: crypto.seal(_seal_key(notes, peer), _digest(notes), about=_about("agree", site, peer))
            for peer in survivors if peer != site}


def reveal(site: str, inbox: _Inbox, notes: Notes, *, threshold: int) -> _Inbox:
    """Fifth exchange: for each survivor the share of its own mask, for each other member the share of its mask key.

    Afterwards all secrets of the round are deleted, so no second answer is given.

    Raises:
        PrivacyError: a survivor was given other names or shown another state, or fewer than `threshold` are known to
            have been given the same, or this site has helped to unmask another sum of this round. More than half of
            all sites must agree, so two lists cannot both pass.
    """
    _expect(notes, "agreed", site)
    survivors, shares = notes["survivors"], notes["shares"]
    _known(inbox, set(survivors) - {site}, f"{site} received messages of sites that are not survivors")
    for peer, sealed in inbox.items():
        if crypto.unseal(_seal_key(notes, peer), sealed, about=_about("agree", peer, site)) != _digest(notes):
            raise PrivacyError(f"{site} and {peer} were given different lists of survivors or shown different models; "
                               f"{site} reveals nothing, since the server could uncover a single update")
    _enough(len(inbox) + 1, threshold, "survivors agree on who survived")
    summed = hashlib.sha256(_digest(notes) + notes["update"]).hexdigest()
    if notes["past"].setdefault(notes["round"], summed) != summed:
        raise PrivacyError(f"{site} has helped to unmask another sum of round {notes['round']}; the difference of both "
                           "could be a single update. Go on with the next round, or begin a new run")
    answer = {"self": {member: shares[member][SHARE_BYTES:].hex() for member in survivors},
              "mask": {member: shares[member][:SHARE_BYTES].hex() for member in sorted(shares.keys() - set(survivors))}}
    _forget(notes, stage="done")
    return {_SERVER: json.dumps(answer).encode()}


def collect_keys(sent: Messages, notes: Notes, *, threshold: int) -> Messages:
    """At the server: the public keys of all sites that sent theirs, for each of them."""
    roster = {site: sent[site][_SERVER] for site in sorted(sent) if len(sent[site].get(_SERVER, b"")) == 3 * KEY_BYTES}
    _enough(len(roster), threshold, "sites sent their keys")
    notes["roster"] = roster
    return {site: roster for site in roster}


def hand_on_shares(sent: Messages, notes: Notes, *, threshold: int) -> Messages:
    """At the server: sealed shares by recipient. Members are the sites that sent one to every peer."""
    roster = notes["roster"].keys()
    members = sorted(site for site in sent if site in roster and sent[site].keys() == roster - {site})
    _enough(len(members), threshold, "sites shared their secrets")
    notes["members"] = members
    return {site: {peer: sent[peer][site] for peer in members if peer != site} for site in members}


def name_survivors(notes: Notes, arrived: Sequence[str], *, threshold: int) -> Messages:
    """At the server: the names of the members whose updates were received, for each of them."""
    survivors = sorted(arrived)
    _known(survivors, notes["members"], "updates were received from sites that shared no secrets in this round")
    _enough(len(survivors), threshold, "updates were received")
    notes["survivors"] = survivors
    return {site: {_SERVER: json.dumps(survivors).encode()} for site in survivors}


def collect_answers(sent: Messages, notes: Notes, *, threshold: int) -> None:
    """At the server: recovers the own masks of the survivors and the mask keys of the members that dropped out.

    Raises:
        PrivacyError: fewer than `threshold` answers, or a share that was changed: every recovered secret is compared
            with what its site published beforehand.
    """
    survivors, roster = notes["survivors"], notes["roster"]
    index = {site: k for k, site in enumerate(roster)}
    gone = sorted(set(notes["members"]) - set(survivors))
    answers = {site: _parse_answer(site, sent[site].get(_SERVER, b""), survivors, gone)
               for site in survivors if site in sent}
    _enough(len(answers), threshold, "survivors answered")
    used = sorted(answers)[:threshold]
    recovered: dict[str, dict[str, bytes]] = {"self": {}, "mask": {}}
    for kind, members in (("self", survivors), ("mask", gone)):
        for member in members:
            secret = crypto.join_secret({index[site]: answers[site][kind][member] for site in used})
            shown = crypto.commitment(secret) if kind == "self" else crypto.public_key(secret)
            if _keys_of(roster[member])[kind] != shown:
                raise PrivacyError(f"the shares of {member}'s secret do not give what it published; one of {used} "
                                   "holds or sent a changed share. The sum stays hidden")
            recovered[kind][member] = secret
    notes["recovered"] = recovered


def unmask_keys(notes: Notes) -> tuple[tuple[str, ...], list[tuple[bytes, int]]]:
    """At the server: the survivors, and keys and signs of the streams to add to the sum of their updates.

    All notes of the round are deleted.

    Raises:
        PrivacyError: the exchanges that recover the masks have not taken place.
    """
    if "recovered" not in notes:
        raise PrivacyError("the masks of this round were not recovered, so its sum cannot be read")
    survivors, roster, recovered = tuple(notes["survivors"]), notes["roster"], notes["recovered"]
    context = _context(roster, notes["shown"])
    notes.clear()
    keys = [(crypto.derive_key(secret, purpose="self"), -1) for secret in recovered["self"].values()]
    for member, secret in recovered["mask"].items():
        for site in survivors:  # each added the stream it shared with the missing member, with the sign of `mask_keys`
            key = crypto.pair_key(secret, _keys_of(roster[site])["mask"], purpose="mask", context=context)
            keys.append((key, -1 if site < member else 1))
    return survivors, keys


def _parse_answer(site: str, message: bytes, survivors: Sequence[str], gone: Sequence[str]
                  ) -> dict[str, dict[str, bytes]]:
    try:
        found = json.loads(message)
        answer = {kind: {member: bytes.fromhex(share) for member, share in found[kind].items()}
                  for kind in ("self", "mask")}
        if answer["self"].keys() != set(survivors) or answer["mask"].keys() != set(gone):
            raise ValueError("shares of other sites than were asked for")
        if any(len(share) != SHARE_BYTES for shares in answer.values() for share in shares.values()):
            raise ValueError(f"shares of another size than {SHARE_BYTES} bytes")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise PrivacyError(f"{site} answered with something other than its shares ({error})") from error
    return answer


def _enough(count: int, threshold: int, what: str) -> None:
    if count < threshold:
        raise PrivacyError(f"{count} {what}, the threshold is {threshold}; nothing is revealed. Run the round again "
                           "when more sites take part")


def _known(names: Iterable[str], known: Iterable[str], what: str) -> None:
    if strangers := sorted(set(names) - set(known)):
        raise PrivacyError(f"{what}: {strangers}")


def _published(own: Mapping[str, bytes]) -> bytes:
    return crypto.public_key(own["seal"]) + crypto.public_key(own["mask"]) + crypto.commitment(own["self"])


def _keys_of(published: bytes) -> dict[str, bytes]:
    return {name: published[k * KEY_BYTES:(k + 1) * KEY_BYTES] for k, name in enumerate(("seal", "mask", "self"))}


def _seal_key(notes: Notes, peer: str) -> bytes:
    """Bound to all public keys of the round: sites that were shown different keys cannot read each other's messages."""
    return crypto.pair_key(notes["own"]["seal"], _keys_of(notes["roster"][peer])["seal"], purpose="seal",
                    context=_context(notes["roster"]))


def _context(roster: Mapping[str, bytes], shown: str = "") -> bytes:
    pairs = sorted((site, keys.hex()) for site, keys in roster.items())
    return hashlib.sha256(json.dumps([pairs, shown]).encode()).digest()


def _digest(notes: Notes) -> bytes:
    """Of what survivors must agree on: members, survivors, and the state that they were shown."""
    return hashlib.sha256(json.dumps([sorted(notes["shares"]), notes["survivors"], notes["shown"]]).encode()).digest()


def _forget(notes: Notes, **new: Any) -> None:
    """Replaces all notes but the memory of the sums that this site has helped to unmask."""
    past = notes.get("past", {})
    notes.clear()
    notes.update(new, past=past)


def _about(what: str, sender: str, recipient: str) -> bytes:
    return json.dumps([what, sender, recipient]).encode()


def _expect(notes: Notes, stage: str, site: str) -> None:
    """Refuses a step out of order: each step is taken once."""
    found = notes.get("stage", "no keys")
    if found != stage:
        raise PrivacyError(f"{site} is at stage {found!r} of secure aggregation, expected {stage!r}: each step is "
                           "taken once per round, and only by sites that took the steps before it")
