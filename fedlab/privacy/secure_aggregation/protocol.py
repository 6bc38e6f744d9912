"""The messages of secure aggregation: who sends what to whom, and when a site refuses (Bonawitz et al. 2017).

Five exchanges, each by way of the server: every site publishes two keys ("keys"); it splits its secrets into shares,
one for each peer, sealed ("shares"), and opens those it got ("receive"). It then sends its masked update. The
server names the survivors, who assure each other that they were all given the same names ("agree"), and then, for
each peer, give either the share of its own mask or the share of its key, never both ("unmask").

The notes of a site are its `SiteState.secrets`, which are never written to disk; its keys are forgotten when it has
answered. The functions of a site come first, those of the server after them.
"""

from __future__ import annotations

import copy
import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from fedlab.core.errors import PrivacyError
from fedlab.core.types import Messages
from fedlab.privacy.secure_aggregation.crypto import (
    KEY_BYTES,
    SHARE_BYTES,
    commitment,
    derive_key,
    join_secret,
    new_key,
    pair_key,
    public_key,
    seal,
    split_secret,
    unseal,
)

__all__ = ["agree", "collect_answers", "collect_keys", "hand_on_shares", "mask_keys", "name_survivors", "publish_keys",
           "receive_shares", "reveal", "share_secrets", "unmask_keys"]

#: What one party knows in a round, kept in memory only and replaced at each step.
Notes = dict[str, Any]
_Inbox = Mapping[str, bytes]
_SERVER = "server"


def publish_keys(site: str, notes: Notes) -> _Inbox:
    """First exchange: fresh secrets for this round; what was left of another round is forgotten."""
    own = {"seal": new_key(), "mask": new_key(), "self": secrets.token_bytes(KEY_BYTES)}
    _write(notes, {"stage": "keys", "own": {name: key.hex() for name, key in own.items()}})
    return {_SERVER: _published(own)}


def share_secrets(site: str, inbox: _Inbox, notes: Notes, *, threshold: int, sites: int) -> _Inbox:
    """Second exchange: from everybody's public keys to sealed shares of this site's secrets, one for each peer.

    Raises:
        PrivacyError: the keys are not those of `threshold` to `sites` sites with this one among them.
    """
    note = _expect(notes, "keys", site)
    own = _own(note)
    if inbox.get(site) != _published(own):
        raise PrivacyError(f"{site} does not find its own keys among those that the server hands round; its peers "
                           "would seal their messages for somebody else")
    if not threshold <= len(inbox) <= sites or any(len(keys) != 3 * KEY_BYTES for keys in inbox.values()):
        raise PrivacyError(f"{site} expected the keys of {threshold} to {sites} sites, got {len(inbox)} messages of "
                           f"{sorted({len(keys) for keys in inbox.values()})} bytes")
    note["roster"] = {name: inbox[name].hex() for name in sorted(inbox)}
    of_mask = split_secret(own["mask"], threshold=threshold, count=len(inbox))
    of_self = split_secret(own["self"], threshold=threshold, count=len(inbox))
    shares = dict(zip(note["roster"], map(bytes.__add__, of_mask, of_self), strict=True))
    note["shares"] = {site: shares[site].hex()}
    _write(notes, note | {"stage": "shares"})
    return {peer: seal(_seal_key(note, peer), shares[peer], about=_about("share", site, peer))
            for peer in shares if peer != site}


def receive_shares(site: str, inbox: _Inbox, notes: Notes, *, threshold: int) -> _Inbox:
    """Third exchange: the peers' shares are opened and kept. Whoever sent one is a member of this round.

    Raises:
        PrivacyError: fewer than `threshold` members, or a share that was changed on its way.
    """
    note = _expect(notes, "shares", site)
    if not inbox.keys() <= note["roster"].keys() - {site}:
        raise PrivacyError(f"{site} got shares of sites whose keys it does not know: "
                           f"{sorted(inbox.keys() - note['roster'].keys())}")
    _enough(len(inbox) + 1, threshold, "sites shared their secrets")
    for peer, sealed in inbox.items():
        share = unseal(_seal_key(note, peer), sealed, about=_about("share", peer, site))
        if len(share) != 2 * SHARE_BYTES:
            raise PrivacyError(f"{peer} sent {site} shares of {len(share)} bytes, expected {2 * SHARE_BYTES}")
        note["shares"][peer] = share.hex()
    _write(notes, note | {"stage": "ready"})
    return {}


def mask_keys(site: str, notes: Notes) -> list[tuple[bytes, int]]:
    """Keys and signs of the streams that hide this site's update: its own, and one shared with each other member.

    Raises:
        PrivacyError: no masks are agreed, or they have been used: two updates under one mask betray their difference.
    """
    note = _expect(notes, "ready", site)
    own = _own(note)
    context = _context(note["roster"])
    keys = [(derive_key(own["self"], purpose="self"), 1)]
    for peer in sorted(note["shares"].keys() - {site}):
        public = _keys_of(note["roster"][peer])["mask"]
        keys.append((pair_key(own["mask"], public, purpose="mask", context=context), 1 if site < peer else -1))
    _write(notes, note | {"stage": "masked"})
    return keys


def agree(site: str, inbox: _Inbox, notes: Notes, *, threshold: int) -> _Inbox:
    """Fourth exchange: the survivors, as the server named them to this site, repeated to each of them under seal.

    Raises:
        PrivacyError: the list has strangers in it, lacks this site or has fewer than `threshold` names.
    """
    note = _expect(notes, "masked", site)
    try:
        survivors = json.loads(inbox[_SERVER])
        known = survivors == sorted(set(survivors)) and site in survivors and set(survivors) <= note["shares"].keys()
    except (KeyError, TypeError, ValueError) as error:
        raise PrivacyError(f"{site} expected a list of survivors from the server, got none ({error})") from error
    if not known:
        raise PrivacyError(f"{site} refuses a list of survivors that lacks it or names others than this round's "
                           f"members: {survivors}")
    _enough(len(survivors), threshold, "sites survived")
    note["survivors"] = survivors
    _write(notes, note | {"stage": "agreed"})
    return {peer: seal(_seal_key(note, peer), _digest(note), about=_about("agree", site, peer))
            for peer in survivors if peer != site}


def reveal(site: str, inbox: _Inbox, notes: Notes, *, threshold: int) -> _Inbox:
    """Fifth exchange: for each survivor the share of its own mask, for each other member the share of its mask key.

    Afterwards all secrets of the round are forgotten, so nobody gets a second answer.

    Raises:
        PrivacyError: a survivor was given other names, or fewer than `threshold` are known to have the same. More
            than half of all sites must agree, so no two lists can both pass.
    """
    note = _expect(notes, "agreed", site)
    survivors = note["survivors"]
    if not inbox.keys() <= set(survivors) - {site}:
        raise PrivacyError(f"{site} got word from sites that are no survivors: {sorted(inbox.keys() - set(survivors))}")
    for peer, sealed in inbox.items():
        if unseal(_seal_key(note, peer), sealed, about=_about("agree", peer, site)) != _digest(note):
            raise PrivacyError(f"{site} and {peer} were given different lists of survivors; {site} reveals nothing, "
                               "for with both lists the server could uncover a single update")
    _enough(len(inbox) + 1, threshold, "survivors agree on who survived")
    gone = sorted(note["shares"].keys() - set(survivors))
    shares = {member: bytes.fromhex(share) for member, share in note["shares"].items()}
    answer = {"self": {member: shares[member][SHARE_BYTES:].hex() for member in survivors},
              "mask": {member: shares[member][:SHARE_BYTES].hex() for member in gone}}
    _write(notes, {"stage": "done"})
    return {_SERVER: json.dumps(answer).encode()}


def collect_keys(sent: Messages, notes: Notes, *, threshold: int) -> Messages:
    """At the server: everybody's public keys, for everybody who sent some."""
    roster = {site: sent[site][_SERVER] for site in sorted(sent) if len(sent[site].get(_SERVER, b"")) == 3 * KEY_BYTES}
    _enough(len(roster), threshold, "sites sent their keys")
    _write(notes, {"roster": {site: keys.hex() for site, keys in roster.items()}})
    return {site: roster for site in roster}


def hand_on_shares(sent: Messages, notes: Notes, *, threshold: int) -> Messages:
    """At the server: sealed shares to those they are for. Members are the sites that sent one to every peer."""
    note = _read(notes)
    roster = note["roster"].keys()
    members = sorted(site for site in sent if site in roster and sent[site].keys() == roster - {site})
    _enough(len(members), threshold, "sites shared their secrets")
    _write(notes, note | {"members": members})
    return {site: {peer: sent[peer][site] for peer in members if peer != site} for site in members}


def name_survivors(notes: Notes, arrived: Sequence[str], *, threshold: int) -> Messages:
    """At the server: tells each member whose update came who else's did."""
    note = _read(notes)
    survivors = sorted(arrived)
    strangers = sorted(set(survivors) - set(note["members"]))
    if strangers:
        raise PrivacyError(f"updates came from {strangers}, who shared no secrets in this round")
    _enough(len(survivors), threshold, "updates came")
    _write(notes, note | {"survivors": survivors})
    return {site: {_SERVER: json.dumps(survivors).encode()} for site in survivors}


def collect_answers(sent: Messages, notes: Notes, *, threshold: int) -> None:
    """At the server: recovers the own masks of the survivors and the mask keys of the members that dropped out.

    Raises:
        PrivacyError: fewer than `threshold` answers, or a share that was changed: what comes out of the shares is
            compared with what each site published beforehand.
    """
    note = _read(notes)
    survivors, index = note["survivors"], {site: k for k, site in enumerate(note["roster"])}
    gone = sorted(set(note["members"]) - set(survivors))
    answers = {site: _parse_answer(site, sent[site].get(_SERVER, b""), survivors, gone)
               for site in survivors if site in sent}
    _enough(len(answers), threshold, "survivors answered")
    used = sorted(answers)[:threshold]
    secrets_of: dict[str, dict[str, str]] = {"self": {}, "mask": {}}
    for kind, members in (("self", survivors), ("mask", gone)):
        for member in members:
            secret = join_secret({index[site]: bytes.fromhex(answers[site][kind][member]) for site in used})
            known = _keys_of(note["roster"][member])
            if known[kind] != (commitment(secret) if kind == "self" else public_key(secret)):
                raise PrivacyError(f"the shares of {member}'s secret do not give what it published; one of {used} "
                                   "holds or sent a changed share. The sum stays hidden")
            secrets_of[kind][member] = secret.hex()
    _write(notes, note | {"recovered": secrets_of})


def unmask_keys(notes: Notes) -> tuple[tuple[str, ...], list[tuple[bytes, int]]]:
    """At the server: the survivors, and keys and signs of the streams to add to the sum of their updates.

    All that the server kept for the round is forgotten.

    Raises:
        PrivacyError: the exchanges that recover the masks have not taken place.
    """
    note = _read(notes)
    notes.clear()
    if "recovered" not in note:
        raise PrivacyError("the masks of this round were not recovered, so its sum cannot be read")
    survivors, recovered, context = tuple(note["survivors"]), note["recovered"], _context(note["roster"])
    keys = [(derive_key(bytes.fromhex(secret), purpose="self"), -1) for secret in recovered["self"].values()]
    for member, secret in recovered["mask"].items():
        for site in survivors:  # each added the stream it shared with the missing member, with the sign of `mask_keys`
            public = _keys_of(note["roster"][site])["mask"]
            key = pair_key(bytes.fromhex(secret), public, purpose="mask", context=context)
            keys.append((key, -1 if site < member else 1))
    return survivors, keys


def _parse_answer(site: str, message: bytes, survivors: Sequence[str], gone: Sequence[str]) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = json.loads(message)
        shares = [bytes.fromhex(share) for kind in ("self", "mask") for share in answer[kind].values()]
        if answer["self"].keys() != set(survivors) or answer["mask"].keys() != set(gone):
            raise ValueError("shares of other sites than were asked for")
        if any(len(share) != SHARE_BYTES for share in shares):
            raise ValueError(f"shares of another size than {SHARE_BYTES} bytes")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise PrivacyError(f"{site} answered with something other than its shares ({error})") from error
    return answer


def _enough(count: int, threshold: int, what: str) -> None:
    if count < threshold:
        raise PrivacyError(f"{count} {what}, the threshold is {threshold}; nothing is revealed. Run the round again "
                           "when more sites are there")


def _published(own: Mapping[str, bytes]) -> bytes:
    return public_key(own["seal"]) + public_key(own["mask"]) + commitment(own["self"])


def _keys_of(published: str) -> dict[str, bytes]:
    whole = bytes.fromhex(published)
    parts = (whole[at:at + KEY_BYTES] for at in range(0, 3 * KEY_BYTES, KEY_BYTES))
    return dict(zip(("seal", "mask", "self"), parts, strict=True))


def _seal_key(note: Notes, peer: str) -> bytes:
    """Bound to all public keys of the round: sites that were shown different ones cannot read each other."""
    return pair_key(_own(note)["seal"], _keys_of(note["roster"][peer])["seal"], purpose="seal",
                    context=_context(note["roster"]))


def _own(note: Notes) -> dict[str, bytes]:
    return {name: bytes.fromhex(key) for name, key in note["own"].items()}


def _context(roster: Mapping[str, str]) -> bytes:
    return hashlib.sha256(json.dumps(sorted(roster.items())).encode()).digest()


def _digest(note: Notes) -> bytes:
    """Of what survivors must agree on: members and survivors."""
    return hashlib.sha256(json.dumps([sorted(note["shares"]), note["survivors"]]).encode()).digest()


def _about(what: str, sender: str, recipient: str) -> bytes:
    return json.dumps([what, sender, recipient]).encode()


def _expect(notes: Notes, stage: str, site: str) -> Notes:
    """The note of a site that is at this stage of the round; each step is taken once and in order."""
    note = _read(notes) if notes else {"stage": "no keys"}
    if note["stage"] != stage:
        raise PrivacyError(f"{site} is at stage {note['stage']!r} of secure aggregation, expected {stage!r}: each step "
                           "is taken once a round, and by the sites that took those before it")
    return note


def _read(notes: Notes) -> Notes:
    if not notes:
        raise PrivacyError("secure aggregation has not begun in this round: its exchanges come before training")
    return copy.deepcopy(notes)


def _write(notes: Notes, note: Notes) -> None:
    notes.clear()
    notes.update(note)
