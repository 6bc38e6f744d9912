"""The command line: clear refusals, nothing overwritten, no traceback."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import nibabel
import pytest
from tqdm import tqdm

import fedlab
from fedlab.apps.cli import main
from fedlab.apps.cli_arguments import read_shape
from fedlab.apps.comparison import arms_of, read_job
from fedlab.apps.comparison_data import Phantoms
from fedlab.evidence.arms import _BAR, main_arm
from runs import command, contents, finished_demo

TINY = ("--sites", "2", "--patients", "4", "--rounds", "1", "--steps", "1", "--shape", "48,64,48")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return finished_demo(tmp_path_factory.getbasetemp()).folder


@pytest.fixture(autouse=True)
def here(tmp_path, tmp_path_factory, monkeypatch):
    """Relative paths, such as runs/, lead into the test's own folder."""
    monkeypatch.setenv("FEDLAB_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.chdir(tmp_path)


def refused(capsys, *arguments) -> str:
    """What the command line says when it refuses; it never shows a traceback."""
    try:
        status = main([str(a) for a in arguments])
    except SystemExit as end:
        assert end.code == 2
    else:
        assert status == 1
    captured = capsys.readouterr()
    assert captured.err and "Traceback" not in captured.err
    return captured.err


def test_an_existing_run_is_never_overwritten(demo, capsys):
    before = contents(demo)
    said = refused(capsys, "demo", *TINY, "--out", demo)
    assert f"{demo} exists" in said and f"fedlab resume {demo}" in said
    assert contents(demo) == before


def test_even_an_empty_folder_is_left_as_it_is(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    assert "exists" in refused(capsys, "demo", *TINY, "--out", tmp_path / "mine")
    assert not any((tmp_path / "mine").iterdir())


def test_resuming_a_complete_run_says_so_and_changes_nothing(demo, capsys):
    before = contents(demo)
    assert main(["resume", str(demo)]) == 0
    assert f"{demo} is complete: {demo / 'report.html'}" in capsys.readouterr().out
    assert contents(demo) == before


def test_a_foreign_folder_is_not_resumed(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "summary.json").write_text("{}")
    assert "no run that can be continued" in refused(capsys, "resume", tmp_path)
    assert "no run that can be continued" in refused(capsys, "resume", tmp_path / "nowhere")
    assert {p.name for p in tmp_path.iterdir()} == {"notes.txt", "summary.json"}


@pytest.mark.parametrize(("arguments", "says"), [
    (["--shape", "48,64"], "three whole numbers"),
    (["--shape", "big"], "three whole numbers"),
    (["--shape", "48,64,50"], "multiple of 16"),
    (["--shape", "16,64,48"], "at least 32"),
    (["--shape", "-48,64,48"], "--shape"),
    (["--shape", "32,32,32"], "cut the brain off"),
    (["--sites", "0"], "at least one site, got 0"),
    (["--sites", "-3"], "at least one site, got -3"),
    (["--sites", "two"], "invalid int value"),
    (["--sites", "4", "--patients", "0"], "at least 8 patients"),
    (["--sites", "4", "--patients", "5"], "at least 8 patients"),
    (["--sites", "4", "--patients", "9"], "use 8 patients"),
    (["--full", "--patients", "20"], "need 26 patients"),
    (["--full", "--sites", "0"], "at least one site, got 0"),
    (["--rounds", "0"], "--rounds is a positive whole number"),
    (["--steps", "0"], "--steps is a positive whole number"),
    (["--seed", "x"], "invalid int value"),
    (["--real", "nowhere"], "nowhere is not a folder"),
    (["--unknown"], "unrecognized arguments"),
])
def test_wrong_arguments_of_demo(arguments, says, tmp_path, capsys):
    assert says in refused(capsys, "demo", *arguments, "--out", tmp_path / "run")
    assert not any(tmp_path.iterdir())  # and nothing is left of it


def test_wrong_arguments_of_run(tmp_path, capsys):
    table, empty = tmp_path / "sites.csv", tmp_path / "empty"
    table.write_text("Partition_ID,Subject_ID\n1,A\n1,B\n")
    empty.mkdir()
    out = tmp_path / "run"
    assert "nowhere is not a folder" in refused(capsys, "run", "--data", "nowhere", "--sites", table, "--out", out)
    assert "none.csv" in refused(capsys, "run", "--data", empty, "--sites", "none.csv", "--out", out)
    assert "--sites" in refused(capsys, "run", "--data", empty, "--out", out)
    table.write_text("site,patient\n1,A\n")
    assert "no column Partition_ID" in refused(capsys, "run", "--data", empty, "--sites", table, "--out", out)
    assert "--spacing" in refused(capsys, "run", "--data", empty, "--sites", table, "--spacing", "0", "--out", out)
    assert not out.exists()


def test_run_names_the_patients_that_are_missing(tmp_path, capsys):
    table = tmp_path / "sites.csv"
    command("data", "phantom", "--out", tmp_path / "scans", "--sites", 1, "--patients", 2, "--shape", "48,64,48")
    table.write_text("Partition_ID,Subject_ID\n1,site-01-000\n1,site-01-777\n")
    said = refused(capsys, "run", "--data", tmp_path / "scans", "--sites", table, "--out", tmp_path / "run")
    assert "site-01-777" in said
    assert not (tmp_path / "run").exists()


def test_real_scans_without_any_label_are_refused_before_training(tmp_path, capsys):
    scans = tmp_path / "scans"
    command("data", "phantom", "--out", scans, "--sites", 1, "--patients", 2, "--shape", "48,64,48")
    for label in scans.rglob("*_seg.nii.gz"):
        label.unlink()
    said = refused(capsys, "demo", *TINY, "--real", scans, "--out", tmp_path / "run")
    assert "expert's label" in said and "fedlab evaluate" in said
    assert not (tmp_path / "run").exists()


def test_a_place_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "file" in refused(capsys, "demo", *TINY, "--out", tmp_path / "file" / "run")


def test_generated_patients_as_a_brats_folder(tmp_path, capsys):
    out = tmp_path / "scans"
    said = command("data", "phantom", "--out", out, "--sites", 2, "--patients", 4, "--shape", "48,64,48")
    assert "4 patients" in said
    rows = (out / "partitioning.csv").read_text().split()
    assert rows[0] == "Partition_ID,Subject_ID" and len(rows) == 5
    for row in rows[1:]:
        name = row.split(",")[1]
        for kind in ("flair", "t1", "t1ce", "t2", "seg"):
            image = nibabel.load(out / name / f"{name}_{kind}.nii.gz")
            assert image.shape == (48, 64, 48) and image.header.get_zooms() == (3, 3, 3)
    before = contents(out)
    assert "not empty" in refused(capsys, "data", "phantom", "--out", out, "--sites", 1, "--patients", 2)
    assert contents(out) == before
    assert refused(capsys, "data", "phantom", "--out", tmp_path / "none", "--sites", 0)
    assert not (tmp_path / "none").exists()


def interrupt(*_, **__):
    raise KeyboardInterrupt


def test_ctrl_c_names_resume_only_where_there_is_a_run_to_resume(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fedlab.apps.comparison.run_job", interrupt)
    assert main(["demo", *TINY]) == 130
    run = next((tmp_path / "runs").iterdir())
    assert run.name.startswith("demo-")
    assert f"fedlab resume {run.relative_to(tmp_path)}" in capsys.readouterr().err
    assert json.loads((run / "job.json").read_text())["rounds"] == 1
    assert main(["resume", str(run)]) == 130
    assert f"fedlab resume {run}" in capsys.readouterr().err
    monkeypatch.setattr("fedlab.apps.evaluation.evaluate_folder", interrupt)
    assert main(["evaluate", "model", "--data", "scans"]) == 130
    said = capsys.readouterr().err
    assert "interrupted" in said and "resume" not in said


@pytest.mark.parametrize("command", [[], ["demo"], ["run"], ["resume"], ["evaluate"], ["data"], ["data", "phantom"]])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([*command, "--help"])
    assert end.value.code == 0 and "usage: fedlab" in capsys.readouterr().out


def test_without_a_command_it_says_which_there_are(capsys):
    assert "COMMAND" in refused(capsys)
    assert "no command 'train'" in refused(capsys, "train")


@pytest.mark.parametrize(("typed", "meant"), [
    ("inspect x", "'fedlab data inspect'"), ("data inspct x", "'fedlab data inspect'"), ("verfy x", "'fedlab verify'"),
    ("Demo", "'fedlab demo'"), ("evalute m", "'fedlab evaluate'"), ("card x", "'fedlab data card'"),
    ("deploy strat kit", "'fedlab deploy start'"), ("demo --sits 4", "'--sites'"), ("run --dta x", "--data"),
    ("data phantom --out x --sed=3", "'--seed'")])
def test_a_mistyped_word_is_answered_with_what_was_meant(typed, meant, capsys):
    assert meant in refused(capsys, *typed.split())


def test_a_word_like_no_other_is_answered_without_a_guess(capsys):
    said = refused(capsys, "xyzzyqw")
    assert "no command 'xyzzyqw'" in said and "did you mean" not in said and "fedlab --help" in said


def test_the_version_and_the_help_without_a_command(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"fedlab {fedlab.__version__}\n"
    for words, listed in (([], "evaluate"), (["data"], "inspect"), (["export"], "technique")):
        said = refused(capsys, *words)
        assert listed in said and "required" not in said


@pytest.mark.parametrize("spacing", ["2", "3", "4"])
def test_the_size_that_an_error_proposes_is_allowed(spacing, tmp_path, capsys):
    """For the demo, and for every size of voxels."""
    said = refused(capsys, "demo", "--shape", "32,32,32", "--spacing", spacing, "--out", tmp_path / "run")
    proposed = re.search(r"at least (\d+,\d+,\d+) voxels", said)[1]
    shape = read_shape(proposed)
    assert Phantoms(shape=shape, spacing_mm=float(spacing)).shape == shape
    smaller = [n - 16 for n in shape]
    for axis in range(3):
        if smaller[axis] >= 32:
            with pytest.raises(ValueError, match="cut the brain off"):
                Phantoms(shape=(*shape[:axis], smaller[axis], *shape[axis + 1:]), spacing_mm=float(spacing))


def test_a_warning_is_one_note_without_folders_or_source_lines(monkeypatch, capsys):
    def verify(path, head):
        for _ in range(3):
            warnings.warn(f"{path} has spacing_mm=3 twice", stacklevel=1)
            warnings.warn("/data/hospital-a/scans: no label", category=RuntimeWarning, stacklevel=1)
        raise ValueError("enough")

    monkeypatch.setattr("fedlab.run.trace.verify", verify)
    assert main(["verify", "runs/demo"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "note: runs/demo has spacing_mm=3 twice", "note: scans: no label", "fedlab: enough"]


def test_a_page_shows_the_scan_of_a_folder_or_a_file(tmp_path, capsys):
    command("data", "phantom", "--out", "scans", "--sites", 1, "--patients", 2, "--shape", "48,64,48")
    one = tmp_path / "scans" / "site-01-001"
    command("show", one, "--out", "folder.html")
    command("show", one / "site-01-001_t1.nii.gz", "--public", "--out", "file.html")
    command("show", one, "--prediction", one / "site-01-001_seg.nii.gz", "--out", "same.html")
    command("show", "scans", "--out", "all.html")
    folder, file, same, everyone = (Path(f"{name}.html").read_text() for name in ("folder", "file", "same", "all"))
    assert "<h1>site-01-001</h1>" in folder and "WT Dice" not in folder
    assert folder.count("<img") == 2  # the slices, and what the viewer shows until it is drawn
    assert "prediction, WT Dice" in file and "WT Dice 1.00" in same
    assert everyone.count("<h2") == everyone.count("<img") == 2 and "<h1>scans</h1>" in everyone
    assert all("default-src 'none'" in page and str(tmp_path) not in page for page in (folder, file, everyone))
    assert "<script" in folder and "<script" not in everyone  # the viewer of one patient
    assert "exists already" in refused(capsys, "show", one, "--out", "all.html")
    assert "2 patients and there is one prediction" in refused(capsys, "show", "scans", "--prediction", "x.nii.gz")
    assert "no file or folder nowhere" in refused(capsys, "show", "nowhere")
    assert "give one of" in refused(capsys, "show", one, "--public", "--prediction", "x.nii.gz")


def test_report_names_the_page_of_a_run_and_opens_it(tmp_path, monkeypatch, capsys):
    for name, files in {"demo": ["job.json", "summary.json", "report.html"], "evaluate": ["page.html"],
                        "half": ["job.json"], "other": ["notes.txt"]}.items():
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).touch()
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda address: not opened.append(address))
    assert command("report", "demo") == f"{Path('demo/report.html')}\n" and opened == []
    assert command("report", tmp_path / "evaluate", "--open") == f"{tmp_path / 'evaluate' / 'page.html'}\n"
    assert opened == [(tmp_path / "evaluate" / "page.html").as_uri()]
    command("report", "demo", "--open")
    assert opened[1:] == [(tmp_path / "demo" / "report.html").as_uri()], "from a path of this folder too"
    assert "fedlab resume half" in refused(capsys, "report", "half")
    assert "report.html or page.html" in refused(capsys, "report", "other")
    assert "'fedlab runs'" in refused(capsys, "report", "nowhere")
    monkeypatch.setattr("webbrowser.open", lambda address: False)
    assert "no browser" in refused(capsys, "report", "demo", "--open")


def test_lab_opens_the_first_notebook_without_questions(tmp_path, monkeypatch, capsys):
    started = []
    monkeypatch.setattr("os.execv", lambda program, words: started.append(words))
    command("lab", "--", "--no-browser", "--port=8890")
    words = started[-1]
    root = Path(fedlab.__file__).resolve().parents[1]
    assert words[1:4] == ["-m", "jupyterlab", f"--notebook-dir={root / 'notebooks'}"]
    assert "--LabApp.default_url=/lab/tree/00_welcome.ipynb" in words
    assert words[-2:] == ["--no-browser", "--port=8890"]
    settings = next(word for word in words if "app_settings_dir" in word).partition("=")[2]
    overrides = json.loads((Path(settings) / "overrides.json").read_text())
    assert overrides["@jupyterlab/apputils-extension:notification"]["fetchNews"] == "false"
    command("lab", "--folder", tmp_path)
    assert not any("default_url" in word for word in started[-1])
    assert "no folder nowhere" in refused(capsys, "lab", "--folder", "nowhere")


def test_a_quick_demo_is_small_and_says_what_it_cannot_show(monkeypatch, capsys):
    monkeypatch.setattr("fedlab.apps.comparison.run_job", interrupt)
    assert main(["demo", "--quick", "--out", "quick"]) == 130
    job = read_job(Path("quick"))
    assert (job.source.sizes, job.source.held_out, job.rounds, job.steps) == ((5, 5), 1, 4, 3)
    assert "cannot show which model is better" in capsys.readouterr().err
    assert "not both" in refused(capsys, "demo", "--quick", "--full", "--out", "x")


def test_an_arm_with_a_guarantee_spends_the_epsilon_that_was_asked_for(monkeypatch, capsys):
    monkeypatch.setattr("fedlab.apps.comparison.run_job", interrupt)
    assert main(["demo", "--epsilon", "8", "--delta", "0.01", "--clip", "0.5", "--out", "run"]) == 130
    job = read_job(Path("run"))
    arms = arms_of(job, Path("run"))
    assert list(arms) == ["public", "private", "federated", "pooled", "local"] and main_arm(arms) == "private"
    technique = arms["private"].privacy
    assert (technique.clip, technique.delta, technique.max_epsilon) == (0.5, 0.01, 8)
    training = fedlab.privacy.Gaussian(noise_multiplier=technique.noise_multiplier, sample_rate=technique.sample_rate,
                                       steps=job.rounds * job.steps)
    assert 7.9 < fedlab.privacy.epsilon_of([training], delta=0.01) <= 8
    assert all(arm.privacy is None for name, arm in arms.items() if name != "private")
    for wrong, says in ((["--delta", "0.01"], "say --epsilon too"), (["--epsilon", "-1"], "epsilon"),
                        (["--epsilon", "8", "--delta", "2"], "delta"), (["--epsilon", "8", "--clip", "0"], "--clip")):
        assert says in refused(capsys, "demo", *wrong, "--out", "wrong")
    assert not Path("wrong").exists()


def test_the_bar_leaves_room_for_itself_and_says_what_is_left():
    """At 80 columns, with the longest text: share done, time left, arm, round and Dice."""
    text = "local site-02, round 12 of 33, Dice 0.52"
    shown = tqdm.format_meter(40, 100, 30.0, ncols=80, prefix="training", bar_format=_BAR, postfix=text)
    assert len(shown) <= 80 and text in shown and " 40 %" in shown and "00:45 left" in shown
    assert len(shown.split("|")[1]) >= 8
