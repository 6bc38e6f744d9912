"""Convolutions on a CPU: the same numbers, never torch's slow path, also where there is no bf16 in hardware."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from fedlab.core.convolution import FastConvolutions
from fedlab.core.hardware import pick_precision
from fedlab.core.workers import _keep_memory

#: Paired, channels-last, in halves, of two copies, matrix products, and what is left to torch.
LAYERS = [
    (1, (8, 6, 8), nn.Conv3d(8, 8, 3, padding=1)), (2, (6, 5, 8), nn.Conv3d(4, 8, 3, padding=1, bias=False)),
    (2, (5, 6, 7), nn.Conv3d(4, 8, 3, padding=1)), (1, (7, 6, 8), nn.Conv3d(3, 5, 3, padding=(0, 1, 1))),
    (1, (9, 8, 7), nn.Conv3d(3, 5, 3, stride=2, padding=1, dilation=2)),
    (1, (8, 8, 8), nn.Conv3d(16, 16, 3, padding=1)),
    (1, (8, 8, 8), nn.Conv3d(8, 16, 3, stride=2, padding=1)), (2, (4, 4, 4), nn.Conv3d(4, 8, 3, padding="same")),
    (1, (4, 4, 6), nn.Conv3d(4, 6, 4, padding="same")), (1, (6, 6, 6), nn.Conv3d(4, 8, 3, padding="valid")),
    (1, (6, 5, 4), nn.Conv3d(4, 8, (1, 3, 3), padding=(0, 1, 1))), (2, (6, 5, 4), nn.Conv3d(4, 8, (3, 1, 1))),
    (2, (6, 5, 4), nn.Conv3d(8, 3, 1)), (1, (6, 5, 4), nn.Conv3d(8, 3, 1, stride=2)),
    (1, (6, 6, 6), nn.Conv3d(8, 8, 3, groups=2)),
    (1, (6, 5, 4), nn.Conv3d(8, 8, 3, padding=1, padding_mode="circular")),
    (1, (6, 5, 4), nn.ConvTranspose3d(8, 4, 3, stride=2, output_padding=1)),
    (2, (4, 4, 4), nn.ConvTranspose3d(4, 8, 2)),
    (2, (4, 3, 5), nn.Upsample(scale_factor=2, mode="trilinear")), (1, (4, 3, 5), nn.Upsample(size=(7, 7, 7))),
]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("batch", "size", "layer"), LAYERS, ids=str)
def test_numbers_gradients_and_their_gradients_are_those_of_float64(batch, size, layer, last):
    channels = getattr(layer, "in_channels", 8)
    x = torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = _three_orders(layer.double(), x.clone().requires_grad_())
    x = x.float().contiguous(memory_format=torch.channels_last_3d if last else torch.contiguous_format)
    with FastConvolutions():
        found = _three_orders(layer.float(), x.requires_grad_())
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-4 * float(b.abs().max()) + 1e-12)


def _three_orders(layer, x):
    """The output, its gradients, and the gradient of their norm, as gradient inversion takes it."""
    out = layer(x)
    weights = [x, *layer.parameters()]
    first = torch.autograd.grad(out.square().mean(), weights, create_graph=True)
    assert all(g.is_contiguous() for g in first[1:])  # as the weights are: fused optimisers look at memory alone
    second = torch.autograd.grad(sum(g.square().sum() for g in first), weights)
    return [out.detach(), *(g.detach() for g in first), *second]


def test_under_autocast_as_without_up_to_rounding():
    layer, x = nn.Conv3d(4, 8, 3, padding=1), torch.randn(1, 4, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = layer(x)
        with FastConvolutions():
            found = layer(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, plain, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("has", "limit", "expected"), [
    ("avx512_bf16", "", torch.float32), ("amx_bf16", "", torch.bfloat16), ("avx512_f", "", torch.float32),
    ("amx_bf16", "AVX512_CORE", torch.float32), ("amx_bf16", "avx2", torch.float32),
    ("amx_bf16", "AVX512_CORE_VNNI", torch.float32), ("amx_bf16", "AVX512_CORE_BF16", torch.float32),
    ("amx_bf16", "AVX512_CORE_AMX", torch.bfloat16), ("amx_bf16", "ALL", torch.bfloat16)])
def test_bf16_is_chosen_where_the_processor_and_onednn_have_it(monkeypatch, has, limit, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {has: True})
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert pick_precision("auto", torch.device("cpu")) is expected


def test_a_worker_keeps_memory_on_any_system(monkeypatch):
    calls = []
    monkeypatch.setattr("ctypes.CDLL", lambda name: type("Libc", (), {"mallopt": lambda *a: calls.append(a)})())
    _keep_memory()
    assert [a[1:] for a in calls] == [(-3, 2**25), (-1, 2**31 - 1)]
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    _keep_memory()


PROFILED = """
import json, numpy as np, torch
from torch.profiler import ProfilerActivity, profile
import fedlab as fl
from fedlab.core.types import Patient, Site, SiteState
from fedlab.privacy.dp.gradients import per_patient
from fedlab.training.metrics import predict

torch.set_num_threads(1)
rng = torch.Generator().manual_seed(0)
label = torch.randint(0, 2, (24, 24, 24), generator=rng).byte()
case = Patient("p", torch.randn(4, 24, 24, 24, generator=rng), label, np.eye(4))
model = fl.segresnet()
trainer = fl.SiteTrainer(model=model, steps=1, batch_size=1, crop=(24, 24, 24), augment=None, device="cpu")
state = fl.FedAvg().begin(trainer.initial())
kit = trainer.prepare(Site(name="a", train=[case]), state, site_state=SiteState(), seed=0)
image, target = next(iter(kit.loader))

def slow(work):
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        work()
    return sorted({event.name for event in seen.events() if "slow_conv" in event.name})

found = {
    "training": slow(lambda: trainer.fit(kit, Site(name="a", train=[case]), state, site_state=SiteState(), seed=0)),
    "private training": slow(lambda: list(per_patient(kit, image[None], target[None], "backward"))),
    "prediction": slow(lambda: predict(model, case)),
    "in a mirror": slow(lambda: predict(model, case, mirror=True)),
    "in windows": slow(lambda: predict(model, case, window=(16, 16, 16))),
    "evaluation": slow(lambda: fl.evaluate(model, [case])),
    "plain": slow(lambda: model(image)),
}
ours = next(per_patient(kit, image[None], target[None], "backward")).gradients
plain = torch.autograd.grad(trainer.loss(model(image), target), list(model.parameters()))
whole = torch.cat([g.flatten() for g in plain]).norm()
print(json.dumps({"slow": found, "dtype": str(kit.dtype), "same": max(
    float((a[0] - b).norm() / whole) for a, b in zip(ours, plain))}))
"""


def test_no_convolution_is_slow_on_a_processor_without_bf16_and_amx():
    done = subprocess.run([sys.executable, "-c", PROFILED], check=True, capture_output=True, text=True,
                          env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"})
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["slow"].pop("plain")  # what all others would be without FastConvolutions
    assert not any(found["slow"].values()), found["slow"]
    assert found["dtype"] == "torch.float32" and found["same"] < 1e-5
