"""A model on disk is the model, and nothing else is taken for one."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cohorts import blob_patient
from fedlab.core.errors import RunError
from fedlab.core.weights import load_weights, trainable, weights_sha256
from fedlab.training.metrics import predict
from fedlab.training.networks import load_model, save_model, segresnet


@pytest.fixture(scope="module")
def model():
    return segresnet(seed=1)


def header(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def rewritten(source: Path, target: Path, **changes: str | None) -> Path:
    """The same weights with a changed header; None takes an entry away."""
    told = {k: v for k, v in (header(source) | changes).items() if v is not None}
    save_file(load_file(source), target, metadata=told)
    return target


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "model.safetensors", model, spacing_mm=3.0)


def test_round_trip_is_bit_equal(model, saved):
    back, spacing_mm = load_model(saved)
    assert spacing_mm == 3.0
    assert back.settings == model.settings
    for name, parameter in trainable(model).items():
        assert torch.equal(parameter, trainable(back)[name])
    image = torch.randn(1, 4, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(model.eval()(image), back.eval()(image))


def test_a_network_keeps_the_size_of_its_windows(model, tmp_path):
    assert "window" not in model.settings
    back, _ = load_model(save_model(tmp_path / "m.safetensors", segresnet(seed=1, window=24), spacing_mm=3.0))
    assert back.settings["window"] == 24
    assert torch.equal(back.conv_final[2].conv.weight, model.conv_final[2].conv.weight)
    for window in (0, 4, 12, -8, 40.0, True, "40"):
        with pytest.raises(ValueError, match=f"positive multiple of 8 voxels, as X, Y and Z are, got {window}"):
            segresnet(window=window)


def test_a_network_says_whether_its_predictions_are_mirrored_and_so_does_its_file(model, tmp_path):
    mirrored = segresnet(seed=1, mirror=True)
    assert "mirror" not in model.settings  # files of other networks are as before
    back, _ = load_model(save_model(tmp_path / "m.safetensors", mirrored, spacing_mm=3.0))
    assert back.settings == mirrored.settings and back.settings["mirror"] is True
    case = blob_patient("a", seed=1)
    for network in (mirrored, back):
        assert torch.equal(predict(network, case), predict(model, case, mirror=True))
        assert torch.equal(predict(network, case, mirror=False), predict(model, case))
    assert not torch.equal(predict(model, case), predict(model, case, mirror=True))


def test_other_weights_and_an_odd_spacing_are_saved_exactly(model, tmp_path):
    params = {name: p.detach() + 1 for name, p in trainable(model).items()}
    back, spacing_mm = load_model(save_model(tmp_path / "new" / "m.safetensors", model, spacing_mm=0.1 + 0.2,
                                             params=params))
    assert spacing_mm == 0.1 + 0.2
    assert weights_sha256(trainable(back)) == weights_sha256(params) != weights_sha256(trainable(model))
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["m.safetensors"]


def test_nothing_is_overwritten(model, saved):
    before = saved.read_bytes()
    with pytest.raises(RunError, match="exists"):
        save_model(saved, model, spacing_mm=3.0)
    assert saved.read_bytes() == before


def test_only_what_can_be_loaded_again_is_saved(model, tmp_path):
    with pytest.raises(ValueError, match="segresnet"):
        save_model(tmp_path / "m.safetensors", torch.nn.Conv3d(4, 3, 1), spacing_mm=3.0)
    with pytest.raises(ValueError, match="do not fit"):
        save_model(tmp_path / "m.safetensors", model, spacing_mm=3.0, params={"w": torch.zeros(1)})
    assert not any(tmp_path.iterdir())


def test_missing_truncated_and_foreign_files_are_refused(saved, tmp_path):
    with pytest.raises(RunError, match="there is no model file"):
        load_model(tmp_path / "none.safetensors")
    with pytest.raises(RunError, match="there is no model file"):
        load_model(tmp_path)
    whole = saved.read_bytes()
    for length in (0, 5, 200, len(whole) // 2, len(whole) - 1):
        short = tmp_path / "short.safetensors"
        short.write_bytes(whole[:length])
        with pytest.raises(RunError, match="not a readable safetensors file"):
            load_model(short)
    (tmp_path / "text.safetensors").write_text("hello, I am a model")
    with pytest.raises(RunError, match="not a readable safetensors file"):
        load_model(tmp_path / "text.safetensors")
    save_file({"w": torch.zeros(3)}, tmp_path / "foreign.safetensors")
    with pytest.raises(RunError, match="not written by fedlab"):
        load_model(tmp_path / "foreign.safetensors")


@pytest.mark.parametrize(("changes", "says"), [
    ({"format": "fedlab-model-2"}, "not written by fedlab"),
    ({"modalities": "T1,FLAIR,T1c,T2"}, "expects channels T1,FLAIR,T1c,T2"),
    ({"regions": "ET,TC,WT"}, "gives ET,TC,WT"),
    ({"segresnet": None}, "damaged"),
    ({"segresnet": "{"}, "damaged"),
    ({"segresnet": "[]"}, "damaged"),
    ({"segresnet": '{"filters": 9, "dropout": 0.0, "seed": 1}'}, "multiple of 8"),
    ({"segresnet": '{"filters": 16, "dropout": 0.0, "seed": 1}'}, "shape"),
    ({"segresnet": '{"filters": 8, "evil": 1}'}, "damaged"),
    ({"spacing_mm": "thin"}, "damaged"),
    ({"spacing_mm": None}, "damaged"),
])
def test_the_header_is_checked(saved, tmp_path, changes, says):
    with pytest.raises(RunError, match=says):
        load_model(rewritten(saved, tmp_path / "m.safetensors", **changes))


class Payload:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def test_a_pickle_is_refused_unopened(tmp_path):
    trace = tmp_path / "payload-ran"
    torch.save({"w": Payload(trace)}, tmp_path / "zip.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Payload(trace)))
    for name in ("zip.pt", "plain.pt"):
        with pytest.raises(RunError, match="loads no other format"):
            load_model(tmp_path / name)
        assert not trace.exists()
    pickle.loads((tmp_path / "plain.pt").read_bytes())
    assert trace.is_dir()  # the payload would have run


def test_the_hash_knows_names_shapes_types_and_bits_but_no_order():
    params = {"a": torch.arange(6, dtype=torch.float32).view(2, 3), "b": torch.ones(())}
    digest = weights_sha256(params)
    assert len(digest) == 64 and set(digest) <= set("0123456789abcdef")
    assert weights_sha256(dict(reversed(params.items()))) == digest
    assert weights_sha256({"a": params["a"].T.contiguous().T, "b": params["b"]}) == digest  # layout is no content
    changed = params["a"].clone()
    changed.view(torch.int32)[1, 2] ^= 1  # the least bit of one weight
    others = [
        {"a": changed, "b": params["b"]},
        {"c": params["a"], "b": params["b"]},
        {"a": params["a"].view(3, 2), "b": params["b"]},
        {"a": params["a"].view(torch.int32), "b": params["b"]},
        {"a": params["a"], "b": params["b"].view(1)},
        {"a": params["a"]},
        {"a": -params["a"], "b": params["b"]},
        {"a": params["a"], "b": params["b"], "empty": torch.empty(0)},
    ]
    assert len({digest, *map(weights_sha256, others)}) == 1 + len(others)
    assert weights_sha256({"x": torch.tensor(0.0)}) != weights_sha256({"x": torch.tensor(-0.0)})
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool):
        assert len(weights_sha256({"x": torch.ones(3, dtype=dtype)})) == 64


def test_weights_that_do_not_fit_change_nothing(model):
    own = trainable(model)
    before = weights_sha256(own)
    names = list(own)
    good = {name: torch.zeros_like(p) for name, p in own.items()}
    with pytest.raises(ValueError, match=r"1 missing .*, 0 unknown"):
        load_weights(model, {name: good[name] for name in names[1:]})
    with pytest.raises(ValueError, match=r"0 missing .*, 1 unknown \['extra'\]"):
        load_weights(model, good | {"extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=f"{names[-1]} has shape"):
        load_weights(model, good | {names[-1]: torch.zeros(7, 7)})
    assert weights_sha256(trainable(model)) == before


def test_loaded_weights_are_copies(model):
    target = segresnet(seed=5)
    params = {name: p.detach().clone() for name, p in trainable(model).items()}
    load_weights(target, params)
    digest = weights_sha256(trainable(target))
    assert digest == weights_sha256(params)
    next(iter(params.values())).add_(1)
    assert weights_sha256(trainable(target)) == digest


@pytest.mark.parametrize("filters", [0, -8, 4, 9, 12])
def test_filters_are_multiples_of_eight(filters):
    with pytest.raises(ValueError, match=f"multiple of 8.*got {filters}"):
        segresnet(filters=filters)


def test_one_seed_gives_one_start_and_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = weights_sha256(trainable(segresnet(seed=0)))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert weights_sha256(trainable(segresnet(seed=0))) == first
    assert weights_sha256(trainable(segresnet(seed=1))) != first


def test_the_network_maps_four_channels_to_three_regions_without_batch_norm(model):
    with torch.inference_mode():
        assert model(torch.zeros(2, 4, 16, 24, 32)).shape == (2, 3, 16, 24, 32)
    assert sum(p.numel() for p in trainable(model).values()) == 1_176_843
    kinds = {type(part).__name__ for part in model.modules()}
    assert not any("BatchNorm" in kind for kind in kinds)
    assert not any(getattr(part, "inplace", False) for part in model.modules())


def test_a_model_without_a_trainable_parameter_is_refused():
    frozen = torch.nn.Conv3d(4, 3, 1).requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        trainable(frozen)
    half = torch.nn.Conv3d(4, 3, 1)
    half.bias.requires_grad_(False)
    assert list(trainable(half)) == ["weight"]
