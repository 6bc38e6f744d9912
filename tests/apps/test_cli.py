"""The command line: clear refusals, nothing overwritten, no traceback."""

from __future__ import annotations

import json

import nibabel
import pytest

from fedlab.apps.cli import main
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
    (["--full", "--patients", "20"], "at least 26 patients"),
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
    assert "invalid choice" in refused(capsys, "train")
