"""Prepared sites are restored from disk unchanged, or not at all."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cohorts import TinyNet, blob_patient, blob_sites
from fedlab.core.errors import DataError
from fedlab.core.types import Site
from fedlab.core.weights import weights_sha256
from fedlab.data import cache, store
from fedlab.data.store import load_sites, save_sites
from fedlab.run.federate import federate
from trainers import trainer


def same(a, b):
    assert (a.id, a.image.dtype) == (b.id, b.image.dtype)
    assert torch.equal(a.image, b.image) and np.array_equal(a.affine, b.affine)
    assert (a.label is None) == (b.label is None)
    assert a.label is None or (torch.equal(a.label, b.label) and a.label.dtype == b.label.dtype)


def odd_sites():
    """Names and ids with separators and special characters, a missing label, an oblique affine."""
    crooked = np.array([[0, 2.5, 0, -7], [-1.1, 0, 0.1, 1e-9], [0, 0, 3.3, 12], [0, 0, 0, 1]])
    patient = blob_patient("a|b/ü 1", seed=1)
    return [
        Site(name="Zürich/…|val|", train=[replace(patient, affine=crooked, image=patient.image.half()),
                                         replace(blob_patient("10", seed=2), label=None), blob_patient("9", seed=3)],
             val=[replace(blob_patient("", seed=4), id="train|a|image")]),
        Site(name="Aachen", train=[replace(patient, image=patient.image.transpose(1, 3))]),
    ]


def test_sites_are_restored_bit_equal_in_order(tmp_path):
    for sites in (blob_sites((3, 1, 2)), odd_sites()):
        folder = tmp_path / sites[0].name.replace("/", "_")
        save_sites(sites, folder)
        back = load_sites(folder)
        assert [s.name for s in back] == [s.name for s in sites]
        for site, again in zip(sites, back, strict=True):
            for split in ("train", "val"):
                before, after = getattr(site, split), getattr(again, split)
                assert [p.id for p in after] == [p.id for p in before]
                for a, b in zip(before, after, strict=True):
                    same(a, b)
        assert not list(folder.glob("*.part"))


def test_more_than_ten_sites_keep_their_order(tmp_path):
    sites = [Site(name=f"s{k}", train=[blob_patient(f"p{k}", seed=k)]) for k in range(12)]
    save_sites(sites, tmp_path)
    assert [s.name for s in load_sites(tmp_path)] == [f"s{k}" for k in range(12)]


def test_training_on_stored_sites_is_training_on_the_sites(tmp_path):
    sites = blob_sites()
    save_sites(sites, tmp_path)
    runs = [federate(trainer(model=TinyNet()), chosen, rounds=2, seed=4, progress=False)
            for chosen in (sites, load_sites(tmp_path))]
    assert weights_sha256(runs[0].state.params) == weights_sha256(runs[1].state.params)


def test_changing_a_loaded_image_changes_no_file(tmp_path):
    save_sites(blob_sites((1,)), tmp_path)
    before = (tmp_path / "site-000.safetensors").read_bytes()
    load_sites(tmp_path)[0].train[0].image.zero_()
    assert (tmp_path / "site-000.safetensors").read_bytes() == before
    assert load_sites(tmp_path)[0].train[0].image.abs().sum() > 0


def test_saving_again_replaces(tmp_path):
    save_sites(blob_sites((1,)), tmp_path)
    save_sites(blob_sites((2,)), tmp_path)
    assert len(load_sites(tmp_path)[0].train) == 2


def test_an_empty_folder_is_no_data(tmp_path):
    with pytest.raises(DataError, match="no prepared site"):
        load_sites(tmp_path)
    with pytest.raises(DataError, match="no prepared site"):
        load_sites(tmp_path / "missing")


def test_damage_is_noticed(tmp_path):
    save_sites(blob_sites((1, 1)), tmp_path)
    file = tmp_path / "site-001.safetensors"
    whole = file.read_bytes()
    for length in (0, 4, 100, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"site-001\.safetensors is damaged"):
            load_sites(tmp_path)
    one = torch.zeros(1)
    for told in (None, {}, {"site": "x"}, {"site": "x", "order": "["}, {"site": "x", "order": "[]"},
                 {"site": "x", "order": '{"train": ["p"], "val": []}'}, {"order": '{"train": [], "val": []}'}):
        save_file({"train|q|image": one}, file, metadata=told)
        with pytest.raises(DataError, match="damaged"):
            load_sites(tmp_path)
    file.write_bytes(whole)
    assert len(load_sites(tmp_path)) == 2


def half_written(path, data):
    with path.open("wb") as file:
        file.write(data[:10])
    raise OSError(28, "No space left on device")


def test_a_failed_write_leaves_the_former_file_and_no_other(tmp_path, monkeypatch):
    save_sites(blob_sites((1,)), tmp_path)
    cache.store(tmp_path, "settings", {"x": torch.ones(3)})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(store, "save_file", lambda tensors, path, metadata: half_written(path, bytes(100)))
    with pytest.raises(OSError, match="No space left"):
        save_sites(blob_sites((2,)), tmp_path)
    monkeypatch.setattr("pathlib.Path.write_bytes", half_written)
    with pytest.raises(OSError, match="No space left"):
        cache.store(tmp_path, "settings", {"x": torch.zeros(3)})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
