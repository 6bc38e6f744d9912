"""Downloads, from a file server on this machine: licence first, and either the expected archive or nothing."""

from __future__ import annotations

import functools
import hashlib
import http.server
import io
import tarfile
import threading

import pytest

from fedlab.apps.cli import main
from fedlab.data.fetch import SETS
from fedlab.data.readers.folders import read_cohort
from folders import ball, write_msd


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of a folder served over HTTP, and that folder."""
    folder = tmp_path_factory.mktemp("served")

    class Silent(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Silent, directory=folder)) as http_server:
        thread = threading.Thread(target=http_server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http_server.server_address[1]}", folder
        http_server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def direct(monkeypatch):
    """No proxy between the test and its server."""
    monkeypatch.setenv("no_proxy", "*")


def pack(path, content):
    with tarfile.open(path, "w") as archive:
        content(archive)
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def archive(server, tmp_path_factory):
    """A small Decathlon on the server: its address and checksum."""
    address, folder = server
    scans = tmp_path_factory.mktemp("msd")
    write_msd(scans, [ball("BRATS_001"), ball("BRATS_002", seed=1)])
    md5 = pack(folder / "brain.tar", lambda tar: tar.add(scans, "Task01_BrainTumour"))
    return f"{address}/brain.tar", md5


def fetch(capsys, *arguments):
    status = main(["data", "fetch", *map(str, arguments)])
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return status, said.out, said.err


@pytest.mark.parametrize("name", ["msd-brain", "Task01_BrainTumour"])
def test_a_data_set_is_fetched_checked_and_readable(tmp_path, archive, capsys, name):
    url, md5 = archive
    status, out, _ = fetch(capsys, name, "--out", tmp_path / "new" / "data", "--url", url, "--md5", md5)
    assert status == 0 and f"scans: {tmp_path / 'new' / 'data' / 'Task01_BrainTumour'}" in out
    assert out.index("licence: CC BY-SA 4.0") < out.index("cite: Antonelli") < out.index("scans:")
    cohort = read_cohort(tmp_path / "new" / "data", progress=False)
    assert (cohort.layout, cohort.ids) == ("msd", ("BRATS_001", "BRATS_002"))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["data"]  # no archive, no scratch folder


def test_an_unexpected_archive_is_refused_and_leaves_nothing(tmp_path, archive, capsys):
    for checksum in ([], ["--md5", "0" * 32]):  # without --md5 it must be the published archive
        status, out, err = fetch(capsys, "msd-brain", "--out", tmp_path / "data", "--url", archive[0], *checksum)
        assert status == 1 and "is not the expected archive" in err and "licence:" in out
        assert not any(tmp_path.iterdir())


def test_without_a_network_the_error_explains_the_manual_download(tmp_path, server, capsys, monkeypatch):
    for url in ("http://127.0.0.1:9/brain.tar", f"{server[0]}/none.tar"):
        status, out, err = fetch(capsys, "msd-brain", "--out", tmp_path / "data", "--url", url)
        assert status == 1 and "licence:" in out
        for piece in ("nothing could be downloaded", "By hand: get", url, "240a19d752f0d9e9101544901065d872", "tar xf"):
            assert piece in err
        assert not any(tmp_path.iterdir())
    monkeypatch.setattr("fedlab.data.fetch._check_space", lambda *_: None)
    status, out, err = fetch(capsys, "msd-brain", "--out", tmp_path / "data")  # the tests block it
    assert status == 1 and "Task01_BrainTumour.tar" in out and "By hand" in err


def test_a_broken_archive_or_one_with_outside_paths_is_refused(tmp_path, server, capsys):
    address, folder = server

    def evil(tar):
        info = tarfile.TarInfo("../../evil.txt")
        info.size = 4
        tar.addfile(info, io.BytesIO(b"evil"))

    bad = {"evil.tar": pack(folder / "evil.tar", evil)}
    (folder / "text.tar").write_bytes(b"no archive" * 100)
    bad["text.tar"] = hashlib.md5((folder / "text.tar").read_bytes()).hexdigest()
    for name, md5 in bad.items():
        status, _, err = fetch(capsys, "msd-brain", "--out", tmp_path / "in" / "data", "--url", f"{address}/{name}",
                               "--md5", md5)
        assert status == 1 and "cannot be unpacked" in err, name
        assert not list(tmp_path.rglob("*.txt")) and not list((tmp_path / "in").iterdir())


def test_nothing_is_overwritten_and_unknown_names_are_explained(tmp_path, archive, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    status, out, err = fetch(capsys, "msd-brain", "--out", tmp_path, "--url", archive[0], "--md5", archive[1])
    assert status == 1 and "not empty" in err and out == ""
    status, _, err = fetch(capsys, "brats2021", "--out", tmp_path / "data")
    assert status == 1 and "msd-brain" in err and "registration" in err and not (tmp_path / "data").exists()
    assert all(one.licence and one.citation for one in SETS.values())


def test_too_little_space_is_reported_before_the_download(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 3e9}))
    status, _, err = fetch(capsys, "msd-brain", "--out", tmp_path / "data")
    assert status == 1 and "3.0 GB free" in err
