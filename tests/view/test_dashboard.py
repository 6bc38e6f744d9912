"""A background run gives bit-equal weights to `federate`; its dashboard displays and controls it."""

from __future__ import annotations

import base64
import math
import re
import signal
import threading
import time
from dataclasses import replace

import pytest
import torch

from cohorts import TinyNet, blob_sites
from fedlab.core.errors import PrivacyBudgetExhausted, RunError, SiteError
from fedlab.core.regions import labels_to_regions
from fedlab.core.weights import load_weights, trainable, weights_sha256
from fedlab.evidence.membership import RoundMembership
from fedlab.privacy.at_sites import AtSites
from fedlab.privacy.base import Privacy
from fedlab.privacy.compression import SharePercentile, TopK
from fedlab.privacy.dp.dpsgd import DPSGD
from fedlab.privacy.dp.site_level import CentralGaussian, LocalGaussian
from fedlab.privacy.secure_aggregation.secure_sum import SecureAggregation
from fedlab.run.federate import federate
from fedlab.run.svg_charts import chart
from fedlab.strategies.averaging import FedAvg
from fedlab.training.defaults import DiceBCE
from fedlab.training.trainer import SiteTrainer
from fedlab.view.background_run import BackgroundRun, SiteDice
from fedlab.view.dashboard import RunDashboard, _decimals
from runs import wait_for
from trainers import trainer


@pytest.fixture(autouse=True)
def nothing_left():
    """A test leaves no run under way and no thread of a run."""
    yield
    if (left := BackgroundRun.under_way()) is not None:
        left.stop()
        wait_for(lambda: left.ended, seconds=20, why="the run does not stop")
    wait_for(lambda: not of_runs(), seconds=5, why="a thread of a run remains")


def of_runs() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "fedlab run"]


def bits(history) -> str:
    return weights_sha256(history.state.params)


def dropout_trainer() -> SiteTrainer:
    """Draws from torch's global generator in every step."""
    one = trainer()
    return replace(one, model=torch.nn.Sequential(one.model, torch.nn.Dropout(0.3)))


def private() -> LocalGaussian:
    return LocalGaussian(clip=0.5, noise_multiplier=6.0, delta=0.1, max_epsilon=5.0)


class Slow(Privacy):
    """Delays a round until `go` is set."""

    def __init__(self):
        self.go = threading.Event()

    def protect(self, update, state, rng):
        assert self.go.wait(120)
        return update

    def __repr__(self):
        return "Slow()"


class DropsOut(Privacy):
    """One site withdraws after the first round."""

    def protect(self, update, state, rng):
        if update.site == "site-1" and state.round >= 1:
            raise PrivacyBudgetExhausted("<b>enough</b>")
        return update


@pytest.mark.parametrize("make, privacy", [(trainer, None), (dropout_trainer, None), (trainer, private)])
def test_the_weights_are_those_of_federate_however_often_it_paused(make, privacy):
    sites, settings = blob_sites(), {"rounds": 4, "seed": 3}
    whole = federate(make(), sites, privacy=privacy() if privacy else None, progress=False, **settings)
    one = make()
    run = BackgroundRun(one, sites, privacy=privacy() if privacy else None, **settings)
    assert run.state == "ready" and not of_runs()
    assert len(run.step().wait().records) == 1 and run.state == "paused"
    half = run.step().wait()
    assert len(half.records) == 2
    assert weights_sha256(dict(trainable(one.model))) == bits(half) != bits(whole)
    done = run.start().pause().start().wait(300)
    assert run.state == "finished" and bits(done) == bits(whole)
    assert weights_sha256(dict(trainable(one.model))) == bits(whole)
    assert done.table()["bytes"].tolist() == whole.table()["bytes"].tolist()
    assert done.spent().equals(whole.spent())


def test_a_stopped_run_goes_on_from_its_checkpoint_to_equal_bits(tmp_path):
    sites = blob_sites()
    whole = federate(trainer(), sites, rounds=4, progress=False)
    first = BackgroundRun(trainer(), sites, rounds=4, checkpoint=tmp_path / "run")
    first.step().wait()
    first.step().wait()
    stopped = first.stop().wait()
    assert first.state == "stopped" and "by hand after 2 of 4" in stopped.stopped
    with pytest.raises(RunError, match="make a new BackgroundRun"):
        first.start()
    second = BackgroundRun(trainer(), sites, rounds=4, checkpoint=str(tmp_path / "run"))
    resumed = second.step().wait()
    assert [record["round"] for record in resumed.records] == [0, 1, 2]  # saved rounds are shown too
    done = second.start().wait(300)
    assert bits(done) == bits(whole) and done.table()["loss"].tolist() == whole.table()["loss"].tolist()


def test_the_trainers_own_model_is_free_while_the_run_works():
    sites, one, slow = blob_sites(), trainer(), Slow()
    whole = federate(trainer(), sites, rounds=2, progress=False)
    run = BackgroundRun(one, sites, rounds=2, privacy=slow).start()
    with torch.no_grad():
        for parameter in one.model.parameters():
            parameter.fill_(7.0)  # has no effect on the run
    slow.go.set()
    assert bits(run.wait(300)) == bits(whole)


def test_making_it_again_is_the_same_run_and_another_is_refused():
    sites, one, slow = blob_sites(), trainer(), Slow()

    def made(**changes):
        return BackgroundRun(**({"trainer": one, "sites": list(sites), "rounds": 3, "privacy": slow,
                                 "validate": lambda model, number: {"Dice": 0.5}} | changes))

    first = made().start()
    again = made()  # the cell is run again: a new list, a new lambda, the same objects
    assert again.state == "running" and len(of_runs()) == 1
    again.start()
    assert len(of_runs()) == 1
    panel = RunDashboard(first)
    assert RunDashboard(again).widget is panel.widget
    for other in (made(trainer=trainer()), made(rounds=4), made(validate=lambda model, number: {"Dice": 0.6})):
        assert other.state == "ready"
        with pytest.raises(RunError, match="another run is running in this process"):
            other.start()
    assert len(of_runs()) == 1
    slow.go.set()
    history = again.wait(300)
    assert first.history is history and len(history.records) == 3
    fresh = made()  # after the end it is a new run, from the initial weights
    assert fresh.state == "ready" and bits(fresh.start().wait(300)) == bits(history)


def test_what_fails_is_shown_and_raised_by_wait():
    class Fails(Privacy):
        def protect(self, update, state, rng):
            raise OSError("the disk of <Bern> is full")

    run = BackgroundRun(trainer(), blob_sites(), rounds=2, privacy=Fails())
    shown = RunDashboard(run)
    run.start()
    with pytest.raises(SiteError, match="the disk of <Bern> is full"):
        run.wait(300)
    assert run.state == "failed" and isinstance(run.error, SiteError)
    assert "SiteError" in shown.html() and "&lt;Bern&gt;" in shown.html() and "<Bern>" not in shown.html()
    assert "failed" in shown.widget.children[1].value
    with pytest.raises(SiteError):
        run.wait(300)


def test_wait_says_what_it_cannot_do_and_an_interrupt_leaves_the_run():
    slow = Slow()
    run = BackgroundRun(trainer(), blob_sites(), rounds=2, privacy=slow)
    with pytest.raises(RunError, match="has not been started"):
        run.wait()
    run.start()
    with pytest.raises(TimeoutError, match="still running"):
        run.wait(0.05)
    import _thread
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in processes started with "&"
    try:
        threading.Timer(0.3, _thread.interrupt_main).start()
        with pytest.raises(KeyboardInterrupt):
            run.wait(20)
    finally:
        signal.signal(signal.SIGINT, before)
    assert run.state == "running" and len(of_runs()) == 1
    slow.go.set()
    assert len(run.wait(300).records) == 2


def test_settings_of_federate_only():
    with pytest.raises(TypeError, match="RunDashboard"):
        BackgroundRun(trainer(), blob_sites(), progress=True)
    with pytest.raises(TypeError, match="epochs"):
        BackgroundRun(trainer(), blob_sites(), epochs=3)
    with pytest.raises(TypeError, match="expected a BackgroundRun"):
        RunDashboard(federate)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="budget"):
        RunDashboard(BackgroundRun(trainer(), blob_sites()), budget=-1.0)


def test_buttons_drive_the_run_and_say_when_they_can_be_pressed():
    run = BackgroundRun(trainer(), blob_sites(), rounds=5)
    box = RunDashboard(run).widget
    start, pause, step, stop, note = box.children[0].children
    assert [b.disabled for b in (start, pause, step, stop)] == [False, True, False, True]
    step.click()
    run.wait(300)
    assert [b.disabled for b in (start, pause, step, stop)] == [False, True, False, False]
    assert "1 of 5 rounds" in box.children[1].value and "paused" in box.children[1].value
    step.click()
    run.wait(300)
    assert "2 of 5 rounds" in box.children[1].value
    stop.click()
    wait_for(lambda: run.ended, seconds=20, why="stop has no effect")
    wait_for(lambda: all(b.disabled for b in (start, pause, step, stop)), seconds=5, why="buttons stay enabled")
    assert len(run.history.records) == 2
    start.click()  # as from a page that is not up to date
    assert "the run is stopped" in note.value


def test_the_page_shows_every_site_and_what_the_guarantee_costs():
    sites = blob_sites()
    run = BackgroundRun(trainer(), sites, rounds=3, privacy=private(), validate=SiteDice(sites=tuple(sites)))
    shown = RunDashboard(run)
    assert "nothing yet" in shown.html()
    history = run.start().wait(300)
    page = shown.html()
    last = history.spent().loc[2].loc[("site-0", "site")]
    assert f"ε = {last.epsilon:.3g} at δ = 0.1 per site (any two updates of a site, rdp accountant), of 5" in page
    assert "ε per site, budget 5" in page and "δ = 0.1, per site, any two updates of a site, rdp accountant" in page
    for found in re.finditer(r"ε = ", page):
        assert "δ = " in page[found.start():found.start() + 40]
    assert "No site reports its loss." in page and "Under the guarantee losses" in page  # the loss stays at the site
    assert "a simulation holds" in page  # the share clipped is read from the state of the sites
    assert {name for sites in run.diagnostics.values() for name in sites} == {"site-0", "site-1"}
    dice = history.table()[["Dice", "Dice, site-0", "Dice, site-1"]]
    assert dice.notna().all().all() and f"{dice['Dice, site-1'].iloc[-1]:.3g}" in page
    by_hand = (dice["Dice, site-0"] + dice["Dice, site-1"]) / 2  # one held-out patient each
    assert dice["Dice"].to_numpy() == pytest.approx(by_hand.to_numpy())


def test_clipping_norms_and_bytes_are_those_of_the_run():
    sites = blob_sites()
    run = BackgroundRun(trainer(), sites, rounds=2, privacy=private())
    history = run.start().wait(300)
    clipped = [run.diagnostics[r][s]["norm before clipping"] > 0.5 for r in (0, 1) for s in ("site-0", "site-1")]
    assert any(clipped)
    last = 100 * (run.diagnostics[1]["site-0"]["norm before clipping"] > 0.5)
    row = re.search(r"<tr><td[^>]*>site-0</td>.*?</tr>", RunDashboard(run).html()).group()
    sent = history.sites().xs("site-0", level="site")
    assert f"{last:.0f} %" in row and f"{sent['bytes'].sum() / 1e6:.3f}" in row
    assert f"{sent['norm'].iloc[-1]:.3g}" in row


def test_masked_updates_have_no_norm():
    run = BackgroundRun(trainer(), blob_sites((1, 1, 1)), rounds=1, strategy=FedAvg(weights="uniform"),
                        aggregation=SecureAggregation(threshold=2))
    run.start().wait(300)
    page = RunDashboard(run).html()
    assert "Bytes sent so far" in page and "Norm of the update" not in page and ">norm<" not in page


def test_the_signal_to_noise_ratio_is_that_of_the_norms_at_the_site():
    """From the definition: the clipped update over σ √n, which the noise of one draw meets within a few per cent."""
    run = BackgroundRun(trainer(), blob_sites(), rounds=2, privacy=private())
    history = run.start().wait(300)
    entries = sum(t.numel() for t in history.state.params.values())
    page = RunDashboard(run).html()
    for name in ("site-0", "site-1"):
        clipped = min(0.5, run.diagnostics[1][name]["norm before clipping"])
        row = re.search(rf"<tr><td[^>]*>{name}</td>.*?</tr>", page).group()
        shown = float(re.findall(r"<td[^>]*>([\d.]+)</td>", row)[-1])
        assert shown == pytest.approx(clipped / (6.0 * 0.5 * math.sqrt(entries)), rel=0.1)  # 675 draws
    assert "Signal-to-noise ratio" in page and "the norms before the noise are read" in page


def test_the_ratio_of_dpsgd_is_that_of_a_step():
    """Every patient in the one step, all gradients longer than the clip: the clip times the sum of directions."""
    site, clip, one = blob_sites((3,))[0], 1e-3, trainer(steps=1)
    run = BackgroundRun(one, [site], rounds=1, privacy=DPSGD(clip=clip, noise_multiplier=2.0, sample_rate=1.0,
                                                             delta=0.1))
    entries = sum(t.numel() for t in run.start().wait(300).state.params.values())
    weights, units = trainer().initial(), []
    for patient in site.train:  # the crop is the whole scan
        model = TinyNet()
        load_weights(model, weights)
        DiceBCE()(model(patient.image[None]), labels_to_regions(patient.label)[None].float()).backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        units.append(gradient / gradient.norm())
        assert gradient.norm() > clip
    by_hand = float(sum(units).norm()) / (2.0 * math.sqrt(entries))
    told = run.diagnostics[0]["site-0"]
    assert told["norm of the clipped sum"] / told["norm of the noise"] == pytest.approx(by_hand, rel=1e-3)
    assert f"{by_hand:.3g}"[:4] in RunDashboard(run).html()


def test_dpsgd_in_secure_mode_notes_no_norm_of_a_sum():
    technique = DPSGD(clip=1e-3, noise_multiplier=2.0, sample_rate=1.0, delta=0.1, secure_mode=True)
    run = BackgroundRun(trainer(steps=1), blob_sites((3,)), rounds=1, privacy=technique)
    run.start().wait(300)
    told = run.diagnostics[0]["site-0"]
    assert "norm of the clipped sum" not in told and "norm of the noise" not in told
    assert "Signal-to-noise ratio" not in RunDashboard(run).html()


def test_noise_at_the_server_shows_a_bound_that_needs_no_norm():
    noise = CentralGaussian(clip=0.5, noise_multiplier=0.7, delta=0.1)
    run = BackgroundRun(trainer(), blob_sites((2, 2, 2)), rounds=2, privacy=noise,
                        strategy=FedAvg(weights="uniform"))
    entries = sum(t.numel() for t in run.start().wait(300).state.params.values())
    page = RunDashboard(run).html()
    row = re.search(r"<tr><td[^>]*>server</td>.*?</tr>", page).group()
    assert f"{3 / (0.7 * math.sqrt(entries)):.3g}" in row and "server: upper bound" in page
    assert "site-0" not in page and "norm of the update" not in page.lower()


def test_without_noise_there_is_no_ratio_and_no_empty_panel():
    run = BackgroundRun(trainer(), blob_sites(), rounds=2)
    assert "<svg role" not in RunDashboard(run).html()  # before the first round
    run.start().wait(300)
    page = RunDashboard(run).html()
    assert page.count("<svg role") == 3 and "nothing yet" not in page  # loss, norm, bytes
    assert not any(word in page for word in ("Signal", "signal / noise", "clipped", "Leakage", "ε spent", "absent"))
    assert "Not measured: give validate=" in page and "No formal guarantee" in page


def leak(sites, **settings) -> RoundMembership:
    return RoundMembership(sites=sites, **settings)


def test_leakage_of_every_other_round_with_interval_and_n():
    sites, plain = blob_sites((4, 2)), BackgroundRun(trainer(), blob_sites((4, 2)), rounds=5)
    whole = plain.start().wait(300)
    run = BackgroundRun(trainer(), sites, rounds=5, leakage=leak(sites, every=2, crop=8))
    assert bits(run.start().wait(300)) == bits(whole)  # the attack changes nothing
    assert list(run.leaked) == [1, 3]
    last = run.leaked[3]
    assert last.trials == 4 and last.low <= last.value <= last.high  # two held out, so two members
    page = RunDashboard(run).html()
    assert f"membership AUC {last.value:.2f}, n = 4" in page and "95 % intervals" in page
    assert "Outside any guarantee" in page and "the site sees the models of two successive rounds" in page
    assert len(re.findall(r"<path d=\"M[\d.]+ [\d.]+V[\d.]+M", page)) == 2  # an interval per attack
    again = BackgroundRun(trainer(), sites, rounds=5, leakage=leak(sites, every=2, crop=8))
    again.start().wait(300)
    assert [found.value for found in again.leaked.values()] == [found.value for found in run.leaked.values()]


def test_leakage_of_patients_stays_with_the_server_where_it_adds_noise():
    sites = blob_sites()
    for public in (False, True):
        run = BackgroundRun(trainer(), sites, rounds=1, strategy=FedAvg(weights="uniform"), leakage=leak(
            sites, public=public), privacy=CentralGaussian(clip=0.5, noise_multiplier=1.0, delta=0.1))
        run.start().wait(300)
        page = RunDashboard(run).html()
        assert (f"membership AUC {run.leaked[0].value:.2f}" in page) is public
        assert ("Leakage is for the server only" in page) is not public


def test_an_attack_that_fails_ends_no_run(caplog):
    sites = blob_sites()
    run = BackgroundRun(trainer(), sites, rounds=2, leakage=leak(sites))
    object.__setattr__(run.leakage, "_groups", ([], []))  # as if the patients had gone
    assert len(run.start().wait(300).records) == 2 and not run.leaked
    assert "the attack on round 1 failed" in caplog.text and "Leakage" not in RunDashboard(run).html()


def test_a_resumed_run_attacks_from_its_second_round_on(tmp_path):
    sites = blob_sites()
    first = BackgroundRun(trainer(), sites, rounds=3, checkpoint=tmp_path / "run")
    first.step().wait(300)
    first.stop().wait(300)
    run = BackgroundRun(trainer(), sites, rounds=3, checkpoint=tmp_path / "run", leakage=leak(sites))
    run.start().wait(300)
    assert list(run.leaked) == [2]  # of round 1 the model before it is not at hand


def test_the_headline_is_one_line_with_the_time_left():
    both = TopK(keep=0.1) + SharePercentile(keep=0.5, bound=1.0)
    run = BackgroundRun(trainer(), blob_sites(), rounds=400, privacy=both)
    run.step().wait(300)
    run.durations[0] = 90.0
    page = RunDashboard(run).html()
    assert "1 of 400 rounds, 2 min per round, about 10.0 h left; <span" in page
    head = re.search(r"<div style=\"white-space:nowrap.*?</div>", page, re.DOTALL).group()
    assert ">TopK + SharePercentile</span>" in head and "title=" in head and "TopK(keep=0.1" in head
    run.stop().wait(300)
    assert "left" not in re.search(r"rounds, .*?;", RunDashboard(run).html()).group()


def test_a_technique_of_some_sites_is_named_with_its_place():
    def head(names):
        some = AtSites(sites=names, technique=TopK(keep=0.1) + private())
        page = RunDashboard(BackgroundRun(trainer(), blob_sites(), rounds=2, privacy=some)).html()
        return re.search(r"<span title=[^>]*>([^<]*)</span>", page).group(1)

    assert head(["site-0"]) == "TopK + LocalGaussian at site-0"
    assert head(["site-0", "site-1"]) == "TopK + LocalGaussian at 2 sites"


def test_time_is_not_shown_under_a_guarantee():
    run = BackgroundRun(trainer(), blob_sites(), rounds=2, privacy=private())
    run.step().wait(300)
    assert run.durations and " per round" not in re.search(r"of 2 rounds.*?;", RunDashboard(run).html()).group()


def test_numbers_of_a_column_have_the_same_decimals():
    assert [_decimals(values) for values in ({"a": 0.672, "b": 37.6}, {"a": 0.0061, "b": 1.0}, {}, {"a": 0.0},
                                             {"a": 1234.5}, {"a": 1e-12})] == [3, 5, 2, 2, 0, 6]


def test_lines_that_coincide_are_all_seen():
    same = [(1, 1.0), (2, 2.0)]
    drawn = chart("MB", {"a": same, "b": same, "c": same, "d": [(1, 1.0), (2, 3.0)]}, rounds=2,
                  styles={name: (f"#{k}{k}{k}", "") for k, name in enumerate("abcd")})
    dashes = re.findall(r'stroke="#(\d)\d\d" stroke-width="1.5" stroke-dasharray="([^"]*)"'
                        r'(?: stroke-dashoffset="(-?\d+)")?', drawn)
    assert dashes == [("0", "7 14", ""), ("1", "7 14", "-7"), ("2", "7 14", "-14"), ("3", "", "")]


def test_a_site_that_drops_out_is_named_with_its_reason():
    run = BackgroundRun(trainer(), blob_sites(), rounds=3, privacy=DropsOut())
    run.start().wait(300)
    page = RunDashboard(run).html()
    row = re.search(r"<tr><td[^>]*>site-1</td>.*?</tr>", page).group()
    assert "2 of 3 rounds, last round 3" in row and "&lt;b&gt;enough&lt;/b&gt;" in row and "<b>enough" not in page
    assert "No formal guarantee" in page and "Not measured: give validate=" in page


def test_a_static_picture_is_left_where_there_is_no_kernel():
    run = BackgroundRun(trainer(), blob_sites(), rounds=2)
    shown = RunDashboard(run)
    before = shown._repr_mimebundle_()
    assert "image/png" not in before and "0 of 2 rounds" in before["text/html"]
    with pytest.raises(ValueError, match="no round has ended"):
        shown.figure()
    run.start().wait(300)
    after = shown._repr_mimebundle_()
    assert base64.b64decode(after["image/png"]).startswith(b"\x89PNG") and "2 of 2 rounds" in after["text/html"]
    assert "application/vnd.jupyter.widget-view+json" in after
    assert "http" not in after["text/html"] and "<script" not in after["text/html"]


def test_a_view_that_fails_ends_no_run(caplog):
    run = BackgroundRun(trainer(), blob_sites(), rounds=2)

    def broken():
        raise RuntimeError("no such widget")

    run.on_change(broken)
    assert len(run.start().wait(300).records) == 2
    assert "no longer notified" in caplog.text


def test_rounds_shorter_than_the_eye_are_not_all_drawn():
    drawn = []
    run = BackgroundRun(trainer(steps=1), blob_sites((1,)), rounds=40)
    panel = RunDashboard(run)
    panel._panel.content = lambda: drawn.append(time.monotonic()) or f"{len(drawn)}"
    run.start().wait(300)
    assert len(drawn) < 40 / 2 or drawn[-1] - drawn[0] > 0.3 * len(drawn) / 2


def test_site_dice_every_so_many_rounds():
    sites = blob_sites()
    dice = SiteDice(sites=sites, every=2, patients=1)
    model = trainer().model
    assert dice(model, 0) == {} and set(dice(model, 1)) == {"Dice", "Dice, site-0", "Dice, site-1"}
    assert "site-0, site-1" in repr(dice)
    with pytest.raises(ValueError, match="positive whole number"):
        SiteDice(sites=sites, every=0)
    with pytest.raises(ValueError, match="no Dice to measure"):
        SiteDice(sites=[replace(sites[0], val=())])


def test_charts_break_where_rounds_are_missing():
    drawn = chart("Loss <x>", {"Bern": [(1, 1.0), (2, 0.5), (5, 0.4), (6, float("nan"))]}, styles={}, rounds=6)
    path = re.search(r'<title>Bern: 0.4</title><path d="([^"]*)"', drawn).group(1)
    assert path.count("M") == 2 and path.count("L") == 1 and "nan" not in drawn
    assert "Loss &lt;x&gt;" in drawn and 'aria-label="Loss &lt;x&gt;: Bern 0.4"' in drawn
    assert "not measured" in chart("Dice", {"Bern": []}, styles={}, rounds=3, note="not measured")
    flat = chart("Loss", {"Bern": [(1, 2.0), (2, 2.0)]}, styles={}, rounds=2)
    assert "NaN" not in flat and "inf" not in flat


def test_an_executed_notebook_keeps_the_last_state(repository):
    """A real kernel: the cell of the dashboard, run twice, ends with the state after wait(), without a browser."""
    import nbformat
    from nbclient import NotebookClient

    made = ("import sys; sys.path.insert(0, 'tests')\n"
            "from cohorts import blob_sites\nfrom trainers import trainer\nimport threading\n"
            "from fedlab.view.background_run import BackgroundRun\nfrom fedlab.view.dashboard import RunDashboard\n"
            "one, sites = trainer(), blob_sites()")
    shown = "run = BackgroundRun(one, sites, rounds=3)\nrun.step()\nRunDashboard(run)"
    note = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in (
        made, shown, shown,  # run again at once
        "print(sum(thread.name == 'fedlab run' for thread in threading.enumerate()))",
        "history = run.start().wait()", "print(len(history.records), run.state)")])
    NotebookClient(note, timeout=300, kernel_name="python3",
                   resources={"metadata": {"path": str(repository)}}).execute()
    assert note.cells[3].outputs[0].text == "1\n" and note.cells[5].outputs[0].text == "3 finished\n"
    for cell in note.cells[1:3]:
        data = cell.outputs[0].data
        assert "3 of 3 rounds" in data["text/html"] and "finished" in data["text/html"]
        assert data["image/png"] and "application/vnd.jupyter.widget-view+json" in data
