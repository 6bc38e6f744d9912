"""One round of secure aggregation at 13 sites, 4.7 million parameters, on 2 cores: seconds of every part.

    .venv/bin/python benchmarks/secure.py

All sites work in this process, one after the other, so this is the work of the whole federation; in a deployment
each site does its 13th of the masking at the same time as the others. Training is left out.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

import torch

from common import write
from fedlab.core.types import SiteState, Update
from fedlab.core.weights import trainable
from fedlab.privacy.secure_aggregation.secure_sum import SecureAggregation
from fedlab.strategies import weighted_mean
from fedlab.training.networks import segresnet

SITES, THRESHOLD, THREADS = 13, 9, 2


class Clock:
    """Wall and processor seconds by part."""

    def __init__(self) -> None:
        self.parts: dict[str, list[float]] = {}
        self._last = time.perf_counter(), time.process_time()

    def __call__(self, part: str | None) -> None:
        now = time.perf_counter(), time.process_time()
        if part is not None:
            spent = self.parts.setdefault(part, [0.0, 0.0])
            for k in (0, 1):
                spent[k] += now[k] - self._last[k]
        self._last = now


class Messages:
    """The exchanges of one round between sites in this process; counts the bytes of all messages."""

    def __init__(self, technique: SecureAggregation, sites: Sequence[str]) -> None:
        self.technique, self.names, self.sent_bytes = technique, tuple(sites), 0
        self.states = {site: SiteState() for site in sites}

    def send(self, step: str, inboxes: Mapping[str, Mapping[str, bytes]]) -> dict[str, Mapping[str, bytes]]:
        sent = {site: self.technique.answer(step, site, inboxes.get(site, {}), self.states[site])
                for site in self.names}
        self.sent_bytes += sum(len(message) for box in sent.values() for message in box.values())
        return sent


def one_round(technique: SecureAggregation, updates: Mapping[str, Update], *, gone: Sequence[str] = ()
              ) -> tuple[Update, dict[str, list[float]], int]:
    """The unmasked mean, the seconds of every part, and the bytes of all messages but the updates."""
    arrived = tuple(site for site in updates if site not in gone)
    tick, messages = Clock(), Messages(technique, tuple(updates))

    def arriving() -> Iterator[Update]:
        for k, site in enumerate(arrived):
            tick("combine")
            masked = technique.mask(updates[site], messages.states[site], torch.Generator().manual_seed(k))
            tick("mask")
            yield masked

    tick(None)
    keys = technique.before(messages)
    tick("keys and shares")
    mean = weighted_mean(arriving())
    tick("combine")
    messages.names = arrived
    result = technique.after(mean, keys, messages)
    tick("agree, recover and unmask")
    return result, tick.parts, messages.sent_bytes


def summed(parts: Mapping[str, list[float]]) -> dict[str, float]:
    return {**{part: round(wall, 2) for part, (wall, _) in parts.items()},
            "whole round": round(sum(wall for wall, _ in parts.values()), 2),
            "processor seconds": round(sum(cpu for _, cpu in parts.values()), 2)}


def main() -> None:
    torch.set_num_threads(THREADS)
    params = {name: p.detach() for name, p in trainable(segresnet(filters=16)).items()}
    rng = torch.Generator().manual_seed(0)
    updates = {f"site-{k:02d}": Update(site=f"site-{k:02d}", weight=1.0, delta={
        name: 1e-4 * torch.randn(p.shape, generator=rng) for name, p in params.items()}) for k in range(SITES)}
    plain = SecureAggregation(sites=SITES, clip=1.0, threshold=THRESHOLD)
    noisy = SecureAggregation(sites=SITES, clip=1.0, threshold=THRESHOLD, noise_multiplier=1.0, delta=1e-3)
    rounds = {"no one drops out": (plain, ()), "two drop out before their update": (plain, ("site-03", "site-07")),
              "with noise of the sites": (noisy, ())}
    seconds = {}
    for name, (technique, gone) in rounds.items():
        tries = [one_round(technique, updates, gone=gone) for _ in range(3 if technique is plain else 1)]
        result, parts, sent = min(tries, key=lambda found: sum(wall for wall, _ in found[1].values()))
        seconds[name] = summed(parts)
        if technique is plain:
            wanted = weighted_mean(u for site, u in updates.items() if site not in gone).delta
            worst = max(float((result.delta[n] - wanted[n]).abs().max()) for n in wanted) / plain.resolution
            seconds[name]["largest error, steps of the fixed point"] = round(worst, 3)
            seconds[name]["kilobytes of messages, all sites"] = round(sent / 1000, 1)
    write("secure", {"sites": SITES, "parameters": sum(p.numel() for p in params.values()), "threshold": THRESHOLD,
                     "bits": plain.bits, "threads": THREADS, "seconds, best of 3 (with noise: of 1)": seconds})


if __name__ == "__main__":
    main()
