"""The comparison: the files of a run, that it repeats bit for bit, and that no interruption changes its result."""

from __future__ import annotations

import base64
import csv
import hashlib
import html
import json
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from statistics import mean

import nibabel as nib
import numpy as np
import pytest

import fedlab.apps.comparison
from cohorts import blob_sites
from fedlab.apps import comparison_results
from fedlab.apps.cli import main
from fedlab.apps.comparison import Job, open_job, read_job, run_job
from fedlab.apps.comparison_data import Folder, Phantoms, equal_sizes
from fedlab.core.errors import DataError, RunError
from fedlab.core.weights import trainable, weights_sha256
from fedlab.data.sites.partition import Partition
from fedlab.training.networks import load_model
from runs import SMALL, Background, Run, command, finished_demo, wait_for

ARMS = ("public", "federated", "pooled", "local_own", "local_others")


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Run:
    return finished_demo(tmp_path_factory.getbasetemp())


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Patients generated once for all runs, and nothing written outside the tests' own folder."""
    monkeypatch.setenv("FEDLAB_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_a_demo_leaves_everything_that_it_promises(demo):
    names = {p.name for p in demo.folder.iterdir()}
    assert names == {"report.html", "history.json", "summary.json", "job.json", "model.safetensors", "scores.csv",
                     "dice.csv", "cross_site.csv", "partition.json", "trace.jsonl", "rounds.csv", "model_card.md",
                     "contributions.csv", "figures"}
    figures = list((demo.folder / "figures").iterdir())
    assert {p.stem for p in figures} == {"tumours", "dice", "cross_site", "curves", "sites", "contributions"}
    for figure in figures:
        image = figure.read_bytes()
        assert image.startswith(b"\x89PNG\r\n\x1a\n") and image.endswith(b"IEND\xaeB`\x82") and len(image) > 10_000
    assert demo.printed.splitlines()[0].endswith(f"fedlab resume {demo.folder}")
    assert str(demo.folder / "report.html") in demo.printed


def test_the_report_is_one_file_that_says_what_was_found(demo):
    page = (demo.folder / "report.html").read_text(encoding="utf-8")
    scripts = re.findall(r"<script([^>]*)>(.*?)</script>", page, re.DOTALL)
    (run,) = (text for kind, text in scripts if not kind)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert policy.startswith("default-src 'none'; ") and "unsafe-inline" not in policy.partition("script-src")[2]
    assert base64.b64encode(hashlib.sha256(run.encode()).digest()).decode() in policy, "the policy names the script"
    assert [kind for kind, _ in scripts if kind] == [' type="application/json"',
                                                     ' type="text/plain" id="fedlab-niivue"']
    assert "@import" not in page
    loaded = re.findall(r"""\b(?:src|href)\s*=\s*["']?([^"'\s>]+)|url\(\s*["']?([^"')]+)""", page)
    assert loaded and all((target or other).startswith(("data:", "#")) for target, other in loaded)
    assert page.count("data:image/png;base64,") == 7
    found = summary_of(demo.folder)
    for arm in ARMS:
        assert f"{found['dice'][arm]['mean']:.2f}" in page
    assert found["weights_sha256"] in page and found["versions"]["torch"] in page
    assert "so a part of the gain over the public model is not what" in page
    assert "nothing generalises from so few" in page and "4 patients were held out and 6 trained on" in page
    assert "2 sites trained one network on 6 patients for 2 rounds" in page and "4 others were held out" in page
    assert "Highest learning rates: federated 0.004, pooled 0.002, local 0.001. Arms whose sites average" in page
    assert "One held-out patient of each site." in page


def test_the_figure_of_tumours_says_whose_they_are():
    assert comparison_results._whose(2, 2) == "each site"
    assert comparison_results._whose(8, 13) == "each of the first 8 sites"


def test_contributions_add_up_to_what_the_run_gained(demo):
    page = (demo.folder / "report.html").read_text(encoding="utf-8")
    text = re.search(r"Shapley values over all coalitions, from ([\d.]+) \(the start\) to ([\d.]+)", page)
    values = [float(row["shapley"]) for row in rows_of(demo.folder / "contributions.csv")]
    assert text and len(values) == 2
    assert sum(values) == pytest.approx(float(text[2]) - float(text[1]), abs=2e-3)
    assert not (demo.folder / "arms").exists()  # the updates are gone with the other working files


def test_the_terminal_shows_the_same_figures(demo):
    found = summary_of(demo.folder)
    for arm in ARMS:
        assert "".join(f"{found['dice'][arm][name]:8.3f}" for name in ("WT", "TC", "ET", "mean")) in demo.printed
    assert "Only 4 patients were held out and 6 trained on: nothing generalises from so few" in demo.printed


def test_every_place_with_a_dice_says_how_empty_regions_counted(demo):
    rule = summary_of(demo.folder)["empty_regions"]
    assert rule.startswith("BraTS rule: a region that both reference and prediction lack has Dice 1")
    assert rule in demo.printed
    page = html.unescape((demo.folder / "report.html").read_text(encoding="utf-8"))
    assert f"Every Dice on this page counts empty regions alike. For the federated model: {rule}" in page
    assert rule in (demo.folder / "model_card.md").read_text(encoding="utf-8")


def test_the_summary_has_exactly_the_promised_keys(demo):
    found = summary_of(demo.folder)
    assert set(found) == {"main", "verdict", "dice", "differences", "empty_regions", "thresholding", "seconds",
                          "patients", "sites", "rounds", "seed", "weights_sha256", "versions"}
    assert set(found["dice"]) == set(ARMS)
    assert all(set(found["dice"][arm]) == {"WT", "TC", "ET", "mean"} for arm in ARMS)
    assert set(found["thresholding"]) == {"WT"} and 0 < found["thresholding"]["WT"] < 1
    assert set(found["seconds"]) == {"data", "train", "evaluate", "total"}
    parts = [found["seconds"][name] for name in ("data", "train", "evaluate")]
    assert sum(parts) == pytest.approx(found["seconds"]["total"], abs=0.3) and min(parts) > 0
    assert (found["patients"], found["sites"], found["rounds"], found["seed"]) == (10, 2, 2, 0)
    assert set(found["versions"]) >= {"fedlab", "python", "torch", "monai"}


def test_the_verdict_claims_nothing_that_the_scores_do_not_show(demo):
    found = summary_of(demo.folder)
    for rule in ("brats", "skip"):
        assert set(found["differences"][rule]) == {"public", "pooled", "local_own", "local_others"}
    for arm, one in found["differences"]["brats"].items():
        assert one["value"] == pytest.approx(found["dice"]["federated"]["mean"] - found["dice"][arm]["mean"])
        assert (one["patients"], one["sites"], one["low"], one["high"]) == (4, 2, None, None)  # too few for an interval
    claim = "In mean Dice on 4 held-out patients, federated is not clearly different from"
    assert found["verdict"].startswith(claim)
    assert "pooled (" in found["verdict"]
    assert "better" not in found["verdict"] and "worse" not in found["verdict"]
    last = " ".join(demo.printed.split("report:")[0].split())
    assert last.endswith(found["verdict"])  # the terminal's last lines
    assert found["verdict"] in html.unescape((demo.folder / "report.html").read_text(encoding="utf-8"))


def test_dice_is_the_mean_of_the_scores_counted_anew(demo):
    rows = rows_of(demo.folder / "scores.csv")
    held_out = {(row["site"], row["patient"]) for row in rows}
    assert len(held_out) == 4  # a third of each site's five
    assert len(rows) == 5 * 3 * 4  # models, regions, patients
    found = summary_of(demo.folder)["dice"]
    own = {True: "local_own", False: "local_others"}
    groups: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        arm = row["arm"]
        name = own[arm == f"local {row['site']}"] if arm.startswith("local ") else arm
        groups.setdefault(name, []).append(row)
    assert set(groups) == set(found)
    for arm, members in groups.items():
        by_region = {region: mean(float(r["dice"]) for r in members if r["region"] == region)
                     for region in ("WT", "TC", "ET")}
        for region, value in by_region.items():
            assert found[arm][region] == pytest.approx(value, abs=1e-12)  # not rounded: a printed figure is, once
        assert found[arm]["mean"] == pytest.approx(mean(by_region.values()), abs=1e-12)
    for row in rows_of(demo.folder / "dice.csv"):
        assert float(row["mean"]) == pytest.approx(found[row["arm"]]["mean"], abs=1e-12)


def test_the_cross_site_table_is_the_mean_of_the_scores(demo):
    rows = rows_of(demo.folder / "scores.csv")
    table = rows_of(demo.folder / "cross_site.csv")
    assert [row["model"] for row in table] == ["public", "federated", "pooled", "local site-01", "local site-02"]
    for line in table:
        for site in ("site-01", "site-02"):
            values = [float(r["dice"]) for r in rows if r["arm"] == line["model"] and r["site"] == site]
            assert float(line[site]) == pytest.approx(mean(values))


def test_the_saved_model_is_the_one_the_hash_names(demo):
    model, spacing_mm = load_model(demo.folder / "model.safetensors")
    assert weights_sha256(trainable(model)) == summary_of(demo.folder)["weights_sha256"]
    assert spacing_mm == 3.0
    assert weights_sha256(trainable(model)) != weights_sha256(Job(source=Phantoms()).trainer().initial())


def test_every_arm_takes_the_same_number_of_gradient_steps(demo):
    history = json.loads((demo.folder / "history.json").read_text())
    assert history.pop("public") == []  # the start of all arms, scored as it is
    assert set(history) == {"federated", "pooled", "local site-01", "local site-02"}
    steps = {arm: sum(site["steps"] for record in records for site in record["sites"].values())
             for arm, records in history.items()}
    alone = sum(count for arm, count in steps.items() if arm.startswith("local "))
    assert steps["federated"] == steps["pooled"] == alone == 2 * 2 * 2
    assert steps["local site-01"] == steps["local site-02"]
    assert all([record["round"] for record in records] == [0, 1] for records in history.values())


def test_the_partition_is_saved_with_the_run_and_stands_in_the_report(demo):
    partition = Partition.load(demo.folder / "partition.json")
    scored = {(row["site"], row["patient"]) for row in rows_of(demo.folder / "scores.csv")}
    assert scored == {(site, patient) for site, ids in partition.held_out.items() for patient in ids}
    assert [len(ids) for ids in partition.train.values()] == [3, 3]
    assert partition == Partition.of(Phantoms(sizes=(5, 5), held_out=1 / 3).prepare(seed=0, workers=0))
    assert partition.how.startswith("Phantoms(sizes=(5, 5), ") and partition.how.endswith("seed=0")
    page = (demo.folder / "report.html").read_text(encoding="utf-8")
    assert partition.id in page and ">held out<" in page


def test_a_run_that_goes_on_with_other_patients_is_refused(tmp_path):
    job, path = Job(source=Phantoms()), tmp_path / "partition.json"
    first, second = blob_sites((3, 2)), blob_sites((2, 3))
    (tmp_path / "partition.json.part").write_text("half written")
    kept = fedlab.apps.comparison._save_partition(job, first, path)
    assert fedlab.apps.comparison._save_partition(job, first, path) == kept == Partition.load(path)
    with pytest.raises(RunError, match=f"began with other patients.*{kept.id}.*begin a new run"):
        fedlab.apps.comparison._save_partition(job, second, path)
    assert Partition.load(path) == kept and [p.name for p in tmp_path.iterdir()] == ["partition.json"]


def test_held_out_patients_are_never_trained_on(demo):
    sites = Phantoms(sizes=(5, 5), held_out=1 / 3).prepare(seed=0, workers=0)
    for site in sites:
        assert (len(site.train), len(site.val)) == (3, 2)
        assert not {p.id for p in site.train} & {p.id for p in site.val}


def same_result(run: Path, demo: Run) -> None:
    found, expected = summary_of(run), summary_of(demo.folder)
    assert {k: v for k, v in found.items() if k != "seconds"} == {k: v for k, v in expected.items() if k != "seconds"}
    assert (run / "scores.csv").read_bytes() == (demo.folder / "scores.csv").read_bytes()
    assert weights_sha256(trainable(load_model(run / "model.safetensors")[0])) == expected["weights_sha256"]


def test_another_seed_gives_other_weights_and_real_scans_are_scored(demo, tmp_path, real_scans):
    real = real_scans / "brats2021_2mm"
    printed = command("demo", *SMALL, "--seed", 1, "--real", real, "--keep", "--out", tmp_path / "run")
    found = summary_of(tmp_path / "run")
    assert found["weights_sha256"] != summary_of(demo.folder)["weights_sha256"]
    assert found["seed"] == 1 and set(found) - set(summary_of(demo.folder)) == {"real"}
    assert found["real"]["patients"] == 5
    rows = rows_of(tmp_path / "run" / "real.csv")
    assert len(rows) == 15
    for region in ("WT", "TC", "ET"):
        assert found["real"]["dice"][region] == pytest.approx(
            mean(float(r["dice"]) for r in rows if r["region"] == region), abs=1e-4)
    assert "federated model on 5 real patients" in printed
    assert (tmp_path / "run" / "figures" / "real.png").is_file()
    assert (tmp_path / "run" / "prepared" / "complete").is_file()  # --keep


def test_the_trace_of_a_demo_is_whole_and_fits_its_model(demo, tmp_path, capsys):
    assert "4 lines, 2 rounds, whole" in command("verify", demo.folder)
    head = command("verify", demo.folder).split()[-1]
    assert "whole" in command("verify", demo.folder, "--head", head)
    assert head in (demo.folder / "model_card.md").read_text("utf-8")
    assert {row["round"] for row in rows_of(demo.folder / "rounds.csv")} == {"0", "1"}
    for name in ("trace.jsonl", "model.safetensors"):
        (tmp_path / name).write_bytes((demo.folder / name).read_bytes())
    changed = (tmp_path / "trace.jsonl").read_bytes().replace(b'"weight":', b'"weight":1', 1)
    (tmp_path / "trace.jsonl").write_bytes(changed)
    assert main(["verify", str(tmp_path)]) == 1 and "line 2 is not what was written" in capsys.readouterr().out


ARMS_FILE = """
import torch
from fedlab.evidence import Arm
from fedlab.privacy import Privacy
from fedlab.strategies import FedProx
from fedlab.training import SiteTrainer

class Halved(Privacy):
    def protect(self, update, state, rng):
        return update.map(lambda t: t / 2)

def arms(seed):
    torch.manual_seed(seed)
    trainer = SiteTrainer(model=torch.nn.Conv3d(4, 3, 1), steps=1, crop=(16, 16, 16))
    return {"start": Arm(trainer=trainer, rounds=0), "halved": Arm(trainer=trainer, rounds=2, privacy=Halved()),
            "proximal": Arm(trainer=trainer, rounds=1, strategy=FedProx(mu=0.1)),
            "alone": Arm(trainer=trainer, rounds=2, data="each")}
"""


def test_any_arms_are_compared_from_a_file(tmp_path, capsys):
    file, out = tmp_path / "arms.py", tmp_path / "run"
    file.write_text(ARMS_FILE)
    printed = command("demo", *SMALL[:4], *SMALL[-2:], "--arms", file, "--out", out)
    found = summary_of(out)
    assert found["main"] == "halved" and set(found["dice"]) == {"start", "halved", "proximal", "alone_own",
                                                                "alone_others"}
    assert set(found["differences"]["brats"]) == {"start", "proximal", "alone_own", "alone_others"}
    assert "alone on others' patients" in printed
    assert found["verdict"] in " ".join(printed.split())
    page = html.unescape((out / "report.html").read_text(encoding="utf-8"))
    assert "Gradient steps of the arms, as far as they may be published: halved 4, proximal 2, alone 4." in page
    assert "strategy=FedProx(" in page and "mu=0.1" in page and "halved: Halved(): no formal guarantee." in page
    assert "gain over the public model" not in page  # these arms begin with a network of their own
    assert not (out / "model.safetensors").exists()  # only networks of segresnet are saved with their settings
    assert (out / "arms.py").read_text() == ARMS_FILE
    assert main(["demo", "--arms", str(file), "--rounds", "2", "--out", str(tmp_path / "b")]) == 1
    says = "says how its arms train; leave --rounds, --steps, --start, --epsilon and --contributions out"
    assert says in capsys.readouterr().err
    file.write_text("arms = 3")
    assert main(["demo", "--arms", str(file), "--out", str(tmp_path / "b")]) == 1
    assert "expected a function arms(seed) that returns" in capsys.readouterr().err and not (tmp_path / "b").exists()


def interrupted(arguments: tuple[str, ...], out: Path, end: str) -> tuple[int, str]:
    """A demo in a process of its own, ended during training; its exit status and its output."""
    run = Background(["demo", *arguments, "--out", str(out)], out.with_suffix(".log"))
    try:
        wait_for(lambda: run.process.poll() is not None or any(out.glob("arms/*/rounds/round-[0-9]*/round.json")),
                 seconds=600, why=f"no checkpoint appeared\n{run.log.read_text()[-2000:]}")
        assert run.process.poll() is None, run.log.read_text()
        run.process.kill() if end == "kill" else run.interrupt()
        status = run.process.wait(timeout=120)
        wait_for(lambda: not run.left(), seconds=20, why="processes were left behind")
    finally:
        run.end()
    assert not (out / "summary.json").exists() and not (out / "report.html").exists()
    arms = list((out / "arms").iterdir())
    assert any(not (arm / "rounds" / "round-0002").is_dir() for arm in arms)  # training was not finished
    return status, run.log.read_text()


def test_a_killed_demo_leaves_no_process_and_resumes_to_equal_bits(demo, tmp_path):
    out = tmp_path / "killed"
    status, _ = interrupted(SMALL, out, "kill")
    assert status == -9
    printed = command("resume", out)
    assert "report:" in printed
    same_result(out, demo)
    assert "whole" in command("verify", out)
    assert not (out / "arms").exists() and not (out / "prepared").exists()


def test_ctrl_c_says_how_to_go_on_leaves_no_process_and_resumes_to_equal_bits(demo, tmp_path):
    out = tmp_path / "stopped"
    status, printed = interrupted((*SMALL, "--keep"), out, "interrupt")
    assert status == 130
    assert f"interrupted; continue with: fedlab resume {out}" in printed and "Traceback" not in printed
    command("resume", out)
    same_result(out, demo)
    assert (out / "prepared" / "complete").is_file() and (out / "arms").is_dir()  # --keep is remembered


def test_two_processes_never_work_in_one_run(tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    open_job(Job(source=Phantoms()), out)
    started = []
    monkeypatch.setattr(fedlab.apps.comparison, "run_job",
                        lambda *_: started.append(1) or (_ for _ in ()).throw(RunError("ran")))
    other = subprocess.Popen([sys.executable, "-c", "import sys; from filelock import FileLock\n"
                              "with FileLock(sys.argv[1]): print('held', flush=True); sys.stdin.read()",
                              str(out / "run.lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        assert main(["resume", str(out)]) == 1 and not started
        assert f"another process works in {out} right now" in capsys.readouterr().err
    finally:
        other.kill()  # which leaves its lock behind
        other.wait()
    assert (out / "run.lock").exists()
    assert main(["resume", str(out)]) == 1 and started
    assert capsys.readouterr().err == "fedlab: ran\n"
    with fedlab.apps.comparison.sole_use(out):  # a run that failed has let go too
        (out / "summary.json").touch()
    assert main(["resume", str(out)]) == 0 and started == [1]


def test_a_run_that_another_process_has_completed_meanwhile_is_not_done_again(tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    open_job(Job(source=Phantoms()), out)
    use = fedlab.apps.comparison.sole_use

    def late(folder):
        (folder / "summary.json").touch()
        return use(folder)

    monkeypatch.setattr(fedlab.apps.comparison, "sole_use", late)
    monkeypatch.setattr(fedlab.apps.comparison, "run_job", lambda *_: pytest.fail("done again"))
    assert main(["resume", str(out)]) == 0
    assert f"{out} is complete" in capsys.readouterr().out


def test_real_scans_of_few_patients_run_and_the_report_says_what_that_is_worth(tmp_path, real_scans):
    data, out = real_scans / "brats2021_2mm", tmp_path / "run"
    printed = command("run", "--data", data, "--sites", data / "partitioning.csv", "--rounds", 1, "--steps", 1,
                     "--spacing", 4, "--out", out)
    found = summary_of(out)
    assert (found["patients"], found["sites"]) == (5, 3)
    rows = rows_of(out / "scores.csv")
    assert {row["site"] for row in rows} == {"1", "2"}  # site 3 has one patient, and holds none out
    assert {row["arm"] for row in rows} == {"public", "federated", "pooled", "local 1", "local 2", "local 3"}
    trained = rows_of(out / "train.csv")
    assert len({row["patient"] for row in trained}) == found["train"]["patients"] == 3
    assert not {row["patient"] for row in trained} & {row["patient"] for row in rows}
    for region in ("WT", "TC", "ET"):
        assert found["train"]["dice"][region] == pytest.approx(
            mean(float(r["dice"]) for r in trained if r["region"] == region), abs=1e-4)
    page = (out / "report.html").read_text(encoding="utf-8")
    warning = "Only 2 patients were held out and 3 trained on: nothing generalises from so few"
    assert warning in page and warning in printed
    assert "No patient is held out at: 3." in page and "The patients are generated" not in page
    assert "federated, on the 3 patients it was trained on" in printed and "On the patients it was trained on" in page
    assert load_model(out / "model.safetensors")[1] == 4.0


def corrected(path):
    """Gives a tumour to another part of the label map, as an expert who corrects a label does."""
    image = nib.load(path)
    labels = np.asanyarray(image.dataobj).copy()
    labels[labels == 2] = 1
    nib.save(nib.Nifti1Image(labels, image.affine, image.header), path)


def test_a_run_notices_labels_that_were_corrected_since_it_read_them(tmp_path, real_scans, capsys, monkeypatch):
    data, out = tmp_path / "scans", tmp_path / "run"
    shutil.copytree(real_scans / "brats2021_2mm", data)
    job = Job(source=Folder(data=str(data), table=str(data / "partitioning.csv"), spacing_mm=4.0), rounds=1, steps=1)
    open_job(job, out)
    with monkeypatch.context() as patch:  # interrupted after training
        patch.setattr(fedlab.apps.comparison, "_results_of", stopped)
        with pytest.raises(KeyboardInterrupt):
            run_job(job, out)
    read = {path.name: path.stat().st_mtime_ns for path in (out / "prepared").iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(fedlab.apps.comparison, "_results_of", stopped)
        with pytest.raises(KeyboardInterrupt):
            run_job(job, out)
    assert read == {path.name: path.stat().st_mtime_ns for path in (out / "prepared").iterdir()}  # not read anew
    for label in sorted(data.glob("*/*seg.nii.gz")):
        corrected(label)
    with pytest.raises(RunError, match="other settings or data"):
        run_job(job, out)
    (out / "summary.json").touch()
    assert main(["resume", str(out)]) == 0
    assert "have changed since this run read them" not in capsys.readouterr().out  # it had read the corrected ones
    corrected(label)
    assert main(["resume", str(out)]) == 0
    assert "have changed since this run read them" in capsys.readouterr().out


def stopped(*_):
    raise KeyboardInterrupt


def test_a_cohort_without_a_held_out_patient_is_refused_before_training(tmp_path, demo):
    data = tmp_path / "scans"
    command("data", "phantom", "--out", data, "--sites", 1, "--patients", 2, "--shape", "48,64,48")
    ids = sorted(p.name for p in data.iterdir() if p.is_dir())
    table = tmp_path / "sites.csv"
    table.write_text("Partition_ID,Subject_ID\n" + "".join(f"{k},{name}\n" for k, name in enumerate(ids)))
    job = Job(source=Folder(data=str(data), table=str(table)))
    open_job(job, tmp_path / "run")
    with pytest.raises(DataError, match="no site holds out a patient"):
        run_job(job, tmp_path / "run")
    assert not (tmp_path / "run" / "arms").exists()


@pytest.mark.parametrize("job", [
    Job(source=Phantoms(sizes=(3, 3, 4), shape=(64, 64, 64), held_out=1), rounds=5, seed=7, real="somewhere"),
    Job(source=Folder(data="scans", table="t.csv", spacing_mm=2.5), crop=(16, 32, 48), lr=1e-3, filters=16, keep=True),
])
def test_a_job_is_read_back_as_it_was_noted(job, tmp_path, monkeypatch):
    monkeypatch.setattr(fedlab.apps.comparison, "_check_inputs", lambda job: None)
    open_job(job, tmp_path / "a" / "run")
    assert read_job(tmp_path / "a" / "run") == job
    with pytest.raises(RunError, match="exists and is left as it is"):
        open_job(replace(job, seed=8), tmp_path / "a" / "run")
    assert read_job(tmp_path / "a" / "run") == job


@pytest.mark.parametrize("text", [
    None, "", "{", "[]", '"job"', "3", "null", '{"format": "fedlab-job-3"}', '{"format": "fedlab-job-2"}',
    '{"format": "fedlab-job-1"}',
    '{"format": "fedlab-job-3", "source_kind": "cloud", "source": {}, "crop": [1]}',
    '{"format": "fedlab-job-3", "source_kind": "folder", "source": [], "crop": [32, 32, 32]}',
    '{"format": "fedlab-job-3", "source_kind": "folder", "source": {"data": "a", "table": "b"}, "crop": [32], "x": 1}',
    '{"format": "fedlab-job-3", "source_kind": "folder", "source": {"data": "a", "table": "b"}, "crop": [], '
    '"rounds": 0}',
])
def test_a_folder_that_is_no_run_is_not_resumed(text, tmp_path):
    if text is not None:
        (tmp_path / "job.json").write_text(text)
    with pytest.raises(RunError, match="no run that can be continued"):
        read_job(tmp_path)


@pytest.mark.parametrize(("make", "says"), [
    (lambda: equal_sizes(0, 4), "at least one site, got 0"),
    (lambda: Phantoms(sizes=()), "at least one site, got none"),
    (lambda: Phantoms(sizes=(4, 1)), "at least two patients.*got the sizes 4, 1"),
    (lambda: equal_sizes(4, 4), "at least 8 patients"),
    (lambda: equal_sizes(4, 10), "use 8 patients"),
    (lambda: Phantoms(shape=(32, 32, 32)), "cut the brain off"),
    (lambda: Phantoms(spacing_mm=20.0), "spacing_mm"),
    (lambda: Folder(data="a", table="b", spacing_mm=0.0), "spacing_mm lies between"),
    (lambda: Job(source=Phantoms(), rounds=0), "rounds is a positive whole number, got 0"),
    (lambda: Job(source=Phantoms(), steps=-1), "steps is a positive whole number, got -1"),
])
def test_settings_that_cannot_work_are_refused_at_once(make, says):
    with pytest.raises(ValueError, match=says):
        make()
    Phantoms(sizes=(2, 5))  # sites need not be equal


def test_a_worker_that_is_killed_is_said_to_be(tmp_path, monkeypatch):
    def broken(*_):
        raise BrokenProcessPool("abrupt")

    monkeypatch.setattr(fedlab.apps.comparison, "_run", broken)
    with pytest.raises(RunError, match=f"killed, perhaps for lack of memory; 'fedlab resume {tmp_path}'"):
        run_job(Job(source=Phantoms()), tmp_path)


def test_a_finished_run_takes_no_time_to_resume(demo):
    started = time.monotonic()
    assert main(["resume", str(demo.folder)]) == 0
    assert time.monotonic() - started < 5


def test_damaged_prepared_data_is_not_trained_on(demo, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(demo.folder, out)
    (out / "summary.json").unlink()
    (out / "prepared").mkdir()
    (out / "prepared" / "complete").touch()
    (out / "prepared" / "site-000.safetensors").write_bytes(b"nothing")
    with pytest.raises(DataError, match="damaged"):
        run_job(read_job(out), out)
