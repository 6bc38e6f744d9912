"""A run's trace: what it says, that no line can be changed unseen, and that an interrupted run goes on in it."""

from __future__ import annotations

import argparse
import hashlib
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from cohorts import blob_patient, blob_sites
from fedlab.apps.cli_runs import add_runs
from fedlab.core.errors import RunError
from fedlab.core.types import Site
from fedlab.core.weights import weights_sha256
from fedlab.data.cards.card import card_template
from fedlab.data.sites.partition import Partition
from fedlab.faults.sites import DropOut, Faulty
from fedlab.privacy.dp.site_level import LocalGaussian
from fedlab.run.admission import Admission
from fedlab.run.federate import federate
from fedlab.run.local import Local
from fedlab.run.trace import model_sha256, verify
from fedlab.topologies.gossip import Gossip
from trainers import trainer


def traced(folder, *, rounds=3, **more):
    """A small run with its checkpoint and its trace in one folder."""
    settings = dict(engine=Faulty(engine=Local(), faults=[DropOut(sites=("site-1",), rounds=(1,))]), rounds=rounds,
                    admission=Admission(), checkpoint=folder, trace=folder / "trace.jsonl", progress=False) | more
    return federate(trainer(), blob_sites(), **settings)


def entries(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("traced") / "run"
    return folder, traced(folder)


@pytest.fixture
def copy(done, tmp_path):
    """The trace alone, to be tampered with."""
    path = tmp_path / "trace.jsonl"
    path.write_bytes((done[0] / "trace.jsonl").read_bytes())
    return path


def test_a_trace_says_what_happened(done):
    folder, history = done
    start, *rounds, end = entries(folder / "trace.jsonl")
    assert [entry["kind"] for entry in (start, *rounds, end)] == ["start", "round", "round", "round", "end"]
    assert start["settings"]["trainer"] == repr(trainer()) and start["settings"]["seed"] == "0"
    assert {"strategy", "privacy", "topology", "admission", "engine", "rounds"} < set(start["settings"])
    assert set(start["versions"]) == {"fedlab", "python", "torch", "monai", "opacus"}
    assert start["partition"] == Partition.of(blob_sites()).id
    ids = json.dumps(sorted(["s1p0", "s1p1", "s1held"]), separators=(",", ":")).encode()
    assert start["sites"]["site-1"]["patients_sha256"] == hashlib.sha256(ids).hexdigest()
    assert "s1p0" not in (folder / "trace.jsonl").read_text()  # nobody is named
    assert start["model"] == rounds[0]["before"] == weights_sha256(trainer().initial())
    assert rounds[2]["after"] == end["model"] == weights_sha256(history.state.params)
    assert "the site did not respond" in rounds[1]["absent"]["site-1"] and set(rounds[1]["sites"]) == {"site-0"}
    assert rounds[0]["sites"]["site-0"]["weight"] == 3 and rounds[0]["cohort"] == ["site-0", "site-1"]
    assert rounds[0]["sites"]["site-0"]["norm"] == history.sites().loc[(0, "site-0"), "norm"]
    verdict = verify(folder)
    assert verdict.ok and verdict.rounds == 3 and verdict.head == end["sha256"] and not verdict.notes
    assert verify(folder, head=verdict.head).ok and "5 lines, 3 rounds, whole" in str(verdict)


def test_privacy_spent_and_cards_are_traced(tmp_path):
    card = card_template()
    sites = [Site(s.name, s.train, s.val, card if k else None) for k, s in enumerate(blob_sites())]
    history = federate(trainer(), sites, rounds=2, trace=tmp_path / "t.jsonl", progress=False,
                       privacy=LocalGaussian(clip=1.0, noise_multiplier=1.0, delta=1e-3))
    start, _, last, _ = entries(tmp_path / "t.jsonl")
    spent = history.spent().loc[(1, "site-0", "site")]
    assert last["spent"]["site-0"][0]["epsilon"] == spent["epsilon"] and last["spent"]["site-0"][0]["delta"] == 1e-3
    assert start["sites"]["site-0"]["card_sha256"] is None
    assert start["sites"]["site-1"]["card_sha256"] == hashlib.sha256(card.to_markdown().encode()).hexdigest()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_byte_can_be_changed(done, data):
    content = (done[0] / "trace.jsonl").read_bytes()
    place = data.draw(st.integers(0, len(content) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda b: b != content[place]))
    scratch = done[0].parent / "changed.jsonl"
    scratch.write_bytes(content[:place] + bytes([byte]) + content[place + 1:])
    assert not verify(scratch).ok


def rehashed(entry):
    """The entry with a hash that fits its changed content, as a careful forger makes it."""
    body = {k: v for k, v in entry.items() if k != "sha256"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    return {**body, "sha256": hashlib.sha256(text).hexdigest()}


def write(path, lines):
    path.write_text("".join(json.dumps(line, sort_keys=True, separators=(",", ":")) + "\n" for line in lines))


@pytest.mark.parametrize("forge, said", [
    (lambda t: t[:2] + t[3:], "line 3 does not follow"),  # a round removed
    (lambda t: [*t[:2], t[3], t[2], t[4]], "line 3 does not follow"),  # two rounds swapped
    (lambda t: t[1:], "a trace has one start"),
    (lambda t: [*t[:2], t[1], *t[2:]], "line 3 does not follow"),  # a round twice
    (lambda t: [*t[:2], rehashed({**t[2], "absent": {}}), *t[3:]], "line 4 does not follow"),
    (lambda t: [*t[:2], rehashed({**t[2], "after": "0" * 64, "previous": t[1]["sha256"]}), *t[3:]], "line 4"),
    (lambda t: [*t, {**t[3], "previous": t[4]["sha256"]}], "line 6 is not what was written"),
    (lambda t: [*t, rehashed({**t[3], "previous": t[4]["sha256"]})], "line 6 comes after the end of the run"),
    (lambda t: [*t[:4], rehashed({**t[4], "round": 9})], "line 5: the end of the run does not match"),
    (lambda t: [t[0], rehashed({"kind": "gift", "round": 0, "previous": t[0]["sha256"]})], "unknown kind"),
    (lambda t: [t[0], rehashed({"kind": "round", "round": 0, "previous": t[0]["sha256"]})], "line 2 lacks"),
])
def test_tampering_is_found_and_named(copy, forge, said):
    write(copy, entries(copy))
    assert verify(copy).ok  # what `write` makes is as the trace makes it
    write(copy, forge(entries(copy)))
    verdict = verify(copy)
    assert any(said in problem for problem in verdict.problems), verdict


def test_a_chain_written_anew_is_found_by_the_head_or_by_the_model_only(done, copy):
    forged, previous = [], None
    for entry in entries(copy)[:-2]:  # without the last round, and with a friendlier weight
        if entry["kind"] == "round":
            entry["sites"]["site-0"]["weight"] = 300.0
        forged.append(rehashed({**entry, "previous": previous or entry["previous"]}))
        previous = forged[-1]["sha256"]
    write(copy, forged)
    assert verify(copy).ok and "has not ended: 2 of 3" in verify(copy).notes[0]
    verdict = verify(copy, head=verify(done[0]).head)
    assert "no line has the head that was noted" in verdict.problems[0]


def test_the_model_must_be_the_one_of_the_trace(done, tmp_path):
    folder = tmp_path / "run"
    traced(folder)
    state = folder / "round-0003" / "state.safetensors"
    tensors = load_file(state)
    save_file({n: t for n, t in tensors.items()}, folder / "model.safetensors")  # other names than the model's
    assert "is not the model that the trace has after 3 rounds" in verify(folder).problems[0]
    params = {n.removeprefix("params|"): t for n, t in tensors.items()}
    save_file(params, folder / "model.safetensors")
    assert verify(folder).ok
    save_file({n: t + 1e-6 for n, t in params.items()}, folder / "model.safetensors")
    assert not verify(folder).ok
    (folder / "model.safetensors").write_bytes(b"nothing")
    assert "damaged" in verify(folder).problems[0]
    (folder / "model.safetensors").unlink()
    lines = (folder / "trace.jsonl").read_text().splitlines()
    (folder / "trace.jsonl").write_text("\n".join(lines[:3]) + "\n")  # whole lines are missing at the end
    assert "is not the model that the trace has after 3 rounds" in str(verify(folder))


class Killed(Exception):
    pass


def killing(number):
    def stop(finished):
        if finished.number == number:
            raise Killed
    return stop


def test_a_resumed_run_goes_on_in_its_trace(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(Killed):
        traced(folder, rounds=4, on_round=[killing(1)])
    verdict = verify(folder)
    assert verdict.ok and "has not ended: 2 of 4 rounds" in verdict.notes[0]
    history = traced(folder, rounds=4)
    kinds = [entry["kind"] for entry in entries(folder / "trace.jsonl")]
    assert kinds == ["start", "round", "round", "resume", "round", "round", "end"]
    assert verify(folder).ok and verify(folder).rounds == 4
    before = (folder / "trace.jsonl").read_bytes()
    traced(folder, rounds=4)  # nothing is left to do, and nothing is written
    assert (folder / "trace.jsonl").read_bytes() == before
    longer = traced(folder, rounds=5)
    assert verify(folder).ok and verify(folder).rounds == 5 and len(history.records) + 1 == len(longer.records)
    assert entries(folder / "trace.jsonl")[7]["settings"] == {"rounds": "5"}


def test_a_round_that_is_traced_but_not_saved_is_run_again(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    from fedlab.run.checkpoint import Checkpoint

    saved = Checkpoint.save

    def fails(self, state, states, records):
        if state.round == 2:
            raise Killed  # after the trace was written, before the checkpoint was
        saved(self, state, states, records)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Checkpoint, "save", fails)
        traced(folder)
    assert verify(folder).ok  # the trace is one round ahead of the checkpoint
    with (folder / "trace.jsonl").open("ab") as file:
        file.write(b'{"kind":"round","cut')
    assert "line 4 is cut off after 20 bytes: the run was killed" in verify(folder).problems[0]
    whole, resumed = traced(tmp_path / "whole"), traced(folder)
    verdict = verify(folder)
    assert verdict.ok and [note for note in verdict.notes if "rounds 1 to 1 were run again" in note]
    assert [note for note in verdict.notes if "cut off was removed before line 4" in note]
    assert weights_sha256(whole.state.params) == weights_sha256(resumed.state.params)
    assert not [note for note in verdict.notes if "another model" in note]  # the repeated round gave the same bits


@pytest.mark.parametrize("left", [0, 5, 400])
def test_a_kill_in_the_first_line_is_no_obstacle(tmp_path, done, left):
    folder = tmp_path / "run"
    traced(folder, rounds=1, trace=None)
    (folder / "trace.jsonl").write_bytes((done[0] / "trace.jsonl").read_bytes()[:left])
    traced(folder, rounds=1)
    assert verify(folder).ok and "begins in round 1" in verify(folder).notes[0]


def test_a_round_that_was_saved_but_is_not_in_the_trace_shows(tmp_path):
    folder = tmp_path / "run"
    traced(folder, rounds=2)
    lines = (folder / "trace.jsonl").read_text().splitlines()
    (folder / "trace.jsonl").write_text("\n".join(lines[:2]) + "\n")
    traced(folder, rounds=3)
    assert "rounds 1 to 1 were run but are not in the trace" in verify(folder).problems[0]
    (folder / "trace.jsonl").unlink()
    traced(folder, rounds=4)
    assert verify(folder).ok and "begins in round 3; the rounds before are not in it" in verify(folder).notes[0]


def test_a_trace_is_of_one_run(tmp_path, done):
    with pytest.raises(RunError, match="exists and is not overwritten"):
        traced(tmp_path / "a", checkpoint=None, trace=done[0] / "trace.jsonl")
    folder = tmp_path / "b"
    traced(folder, rounds=1)
    with pytest.raises(RunError, match="another file"):
        traced(tmp_path / "c", trace=folder / "trace.jsonl", seed=1)
    sites = blob_sites()
    others = [Site(sites[0].name, sites[0].train, [blob_patient("new", seed=1)]), sites[1]]
    with pytest.raises(RunError, match="sites differ"):
        federate(trainer(), others, checkpoint=tmp_path / "d", trace=folder / "trace.jsonl", progress=False,
                 admission=Admission(), engine=Local())
    (tmp_path / "thesis.txt").write_text("precious\n")
    with pytest.raises(RunError, match="no trace, or a damaged one"):
        traced(tmp_path / "e", trace=tmp_path / "thesis.txt")
    assert (tmp_path / "thesis.txt").read_text() == "precious\n"


def test_sites_models_are_in_the_hash(tmp_path):
    import networkx

    folder = tmp_path / "run"
    federate(trainer(), blob_sites(), rounds=1, topology=Gossip(graph=networkx.path_graph(2)), checkpoint=folder,
             trace=folder / "trace.jsonl", progress=False)
    assert verify(folder).ok
    round_, = (e for e in entries(folder / "trace.jsonl") if e["kind"] == "round")
    assert round_["after"] != weights_sha256(trainer().initial()) and round_["metrics"]["consensus distance"] >= 0


def test_numbers_that_json_has_no_word_for(tmp_path):
    federate(trainer(), blob_sites(), rounds=1, trace=tmp_path / "t.jsonl", progress=False,
             validate=lambda model, number: {"Dice": float("nan"), "HD95": float("inf")})
    assert entries(tmp_path / "t.jsonl")[1]["metrics"] == {"Dice": "nan", "HD95": "inf"}
    assert verify(tmp_path / "t.jsonl").ok


def test_the_command_says_what_it_found(done, copy, capsys):
    parser = argparse.ArgumentParser()
    add_runs(parser.add_subparsers())

    def run(*arguments):
        options = parser.parse_args(["verify", *map(str, arguments)])
        return options.command(options)

    assert run(done[0]) == 0 and "whole" in capsys.readouterr().out
    copy.write_bytes(copy.read_bytes()[:-30])
    assert run(copy) == 1 and "cut off" in capsys.readouterr().out
    with pytest.raises(RunError, match="there is no trace"):
        run(copy.parent / "nowhere")


def test_models_of_sites_that_are_exchanged_are_another_model():
    one, other = {"w": torch.tensor([1.0])}, {"w": torch.tensor([2.0])}
    assert model_sha256(one, {"a": one, "b": other}) != model_sha256(one, {"a": other, "b": one})
