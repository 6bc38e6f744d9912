"""Objects as plain data: what is made of it prints the same, and nothing else than a run's parts can be made of it."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import networkx
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from monai.losses import DiceLoss
from monai.networks.nets import UNet
from monai.transforms import Compose, RandFlipd
from torch import nn

import fedlab
from cohorts import TinyNet
from fedlab import DPSGD, FedAvg, FedlabError, Privacy, PrivacyError, SecureAggregation, SiteTrainer, segresnet
from fedlab.core import weights_sha256
from fedlab.deploy.plan import Plan, built, describe, make
from fedlab.privacy import (
    SVT,
    AdaptiveClip,
    Aggregation,
    AtSites,
    CentralGaussian,
    LocalGaussian,
    PartialSharing,
    PersonalLayers,
    Quantise,
    ScaledSign,
    SharePercentile,
    SparseVector,
    TopK,
)
from fedlab.run import Admission, make_run
from fedlab.strategies import (
    SCAFFOLD,
    CoordinateMedian,
    Ditto,
    FedNova,
    FedOpt,
    FedProx,
    GeometricMedian,
    Krum,
    NormBound,
    TrimmedMean,
)
from fedlab.topologies import Buffered, Gossip, Tree, ring, star
from fedlab.training import PolyDecay, augmentation
from warm import PYTHON


def approve_all(module: str) -> None:
    """Nothing is refused for its module."""


def refuse_all(module: str) -> None:
    raise PrivacyError(f"{module} is not approved")


def again(value: Any) -> Any:
    """What is made of the plain data, after it has been text."""
    return make(json.loads(json.dumps(describe(value), allow_nan=False)), approve=approve_all)


positive = st.floats(0.01, 100)
share = st.floats(0.01, 0.99)
secure = st.booleans()
adaptive = st.builds(AdaptiveClip, start=positive, bit_noise=st.floats(60, 100), quantile=share)
TECHNIQUES = {
    Privacy: st.builds(Privacy),
    DPSGD: st.builds(DPSGD, clip=positive | adaptive, noise_multiplier=st.floats(0.5, 100), sample_rate=share,
                     crops=st.integers(1, 4), secure_mode=secure),
    LocalGaussian: st.builds(LocalGaussian, clip=positive, noise_multiplier=positive, secure_mode=secure),
    CentralGaussian: st.builds(CentralGaussian, clip=positive | adaptive, noise_multiplier=st.floats(0.5, 100)),
    SharePercentile: st.builds(SharePercentile, keep=share, bound=st.none() | positive),
    TopK: st.builds(TopK, keep=share), ScaledSign: st.builds(ScaledSign, error_feedback=st.booleans()),
    Quantise: st.builds(Quantise, bits=st.integers(2, 16)),
    PartialSharing: st.builds(PartialSharing, fraction=share, exclude=st.lists(st.text(min_size=1), max_size=3)),
    SVT: st.builds(SVT, fraction=share, epsilon_threshold=positive, epsilon_release=positive, exclude=st.just(["a*"])),
    SparseVector: st.builds(SparseVector, fraction=share, epsilon=positive, rounds=st.integers(1, 5)),
    AtSites: st.builds(AtSites, sites=st.sampled_from([("a",), ("b", "c")]), technique=st.builds(
        LocalGaussian, clip=positive, noise_multiplier=positive)),
    PersonalLayers: st.builds(PersonalLayers, names=st.lists(st.text(min_size=1), min_size=1, max_size=3)),
}
AGGREGATIONS = {
    Aggregation: st.builds(Aggregation),
    SecureAggregation: st.builds(SecureAggregation, sites=st.just(4) | st.none(), threshold=st.integers(3, 4),
                                 clip=positive),
}
sample = st.floats(0.1, 1)
STRATEGIES = {
    FedAvg: st.builds(FedAvg, weights=st.sampled_from(["patients", "steps", "uniform"]), server_lr=positive,
                      sample=sample),
    FedProx: st.builds(FedProx, mu=positive), Ditto: st.builds(Ditto, lam=positive),
    FedNova: st.builds(FedNova, momentum=st.floats(0, 0.9) | st.none()),
    FedOpt: st.builds(FedOpt, rule=st.sampled_from(["adam", "yogi", "adagrad", "momentum"]), server_lr=positive),
    SCAFFOLD: st.builds(SCAFFOLD, sites=st.integers(1, 9) | st.none(), steps=st.integers(1, 9) | st.none(),
                        lr=positive | st.builds(PolyDecay, start=positive, rounds=st.integers(1, 99))),
    CoordinateMedian: st.builds(CoordinateMedian), TrimmedMean: st.builds(TrimmedMean, trim=st.floats(0, 0.4)),
    Krum: st.builds(Krum, attackers=st.integers(0, 3), chosen=st.integers(1, 3)),
    GeometricMedian: st.builds(GeometricMedian), NormBound: st.builds(NormBound, bound=positive),
}
graphs = st.builds(networkx.cycle_graph, st.integers(3, 6)) | st.just(networkx.Graph([("a", "b"), ("b", "c")]))
TOPOLOGIES = [st.just(star), st.just(ring), st.builds(Gossip, graph=graphs),
              st.builds(Tree, regions=st.just({"north": ["a", "b"], "south": ("c",)}),
                        within=st.sampled_from([star, ring]), between=st.sampled_from([star, ring])),
              st.builds(Buffered, size=st.integers(1, 3), seconds=st.dictionaries(st.text(), positive, max_size=3))]


def test_the_lists_above_leave_nothing_out() -> None:
    namespaces = [value for name in fedlab.__all__ if isinstance(value := getattr(fedlab, name), ModuleType)]
    exported = {value for package in (fedlab, *namespaces) for name in package.__all__
                if isinstance(value := getattr(package, name), type)}
    assert {c for c in exported if issubclass(c, Privacy)} == TECHNIQUES.keys()
    assert {c for c in exported if issubclass(c, FedAvg)} == STRATEGIES.keys()
    assert {c for c in exported if issubclass(c, Aggregation)} == AGGREGATIONS.keys()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(st.one_of(*TECHNIQUES.values(), *AGGREGATIONS.values(), *STRATEGIES.values(), *TOPOLOGIES,
                 st.builds(Admission, max_norm=positive)))
def test_what_is_made_prints_as_what_was_described(value: Any) -> None:
    made = again(value)
    assert type(made) is type(value) and repr(made) == repr(value)
    assert describe(made) == describe(value)


def test_techniques_joined_by_plus_stay_in_order() -> None:
    both = SharePercentile(keep=0.25) + LocalGaussian(clip=1.0, noise_multiplier=2.0) + Quantise(bits=4)
    assert repr(again(both)) == repr(both)
    assert again(both).units == both.units


plain = st.recursive(st.none() | st.booleans() | st.integers(-2**63, 2**63 - 1) | st.floats(allow_nan=False)
                     | st.text(max_size=20),
                     lambda inner: st.lists(inner, max_size=4) | st.tuples(inner, inner)
                     | st.dictionaries(st.text(max_size=5) | st.integers(0, 9), inner, max_size=4), max_leaves=20)


@settings(max_examples=200, deadline=None)
@given(plain)
def test_plain_values_come_back_as_they_are(value: Any) -> None:
    made = again(value)
    assert made == value and repr(made) == repr(value)


def trainer(**more: Any) -> SiteTrainer:
    return SiteTrainer(model=built(TinyNet, seed=1), **{"steps": 1, "crop": (8, 8, 8), **more})


def task_of(plan: Plan, start: Any, *, approve: Any) -> Any:
    """What runs at a site that binds the plan's parts to each other."""
    return make_run(**plan.parts(start, approve=approve)).task


def plan_of(train: SiteTrainer | None = None, **more: Any) -> Plan:
    return Plan.of(**{"trainer": train or trainer(), "strategy": FedAvg(), "privacy": Privacy(), "topology": star,
                      "admission": None, "rounds": 2, "seed": 0, "sites": ["a", "b"], **more})


@pytest.mark.parametrize("more", [
    {"lr": PolyDecay(start=0.1, rounds=4)}, {"optimiser": torch.optim.SGD}, {"augment": None},
    {"augment": augmentation(flips=(0,))}, {"optimiser": partial(torch.optim.SGD, momentum=0.9)},
    {"loss": built(DiceLoss, sigmoid=True, batch=False)},
    {"augment": built(Compose, transforms=[built(RandFlipd, keys=["image", "label"], prob=0.5, spatial_axis=0)])},
])
def test_a_trainer_travels_with_what_it_is_made_of(more: dict[str, Any]) -> None:
    train = trainer(**more)
    plan = plan_of(train)
    task = task_of(Plan.from_json(plan.to_json()), train.initial(), approve=approve_all)
    assert weights_sha256(task.trainer.initial()) == weights_sha256(train.initial())
    if "loss" not in more and "transforms" not in str(more):  # those print their address
        assert repr(task.trainer) == repr(train)


def test_first_weights_are_those_of_the_trainer_and_not_those_that_the_factory_makes() -> None:
    model = segresnet(seed=3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.25)
    train = SiteTrainer(model=model, steps=1)
    plan = plan_of(train)
    assert plan.model == weights_sha256(train.initial()) != weights_sha256(SiteTrainer(
        model=segresnet(seed=3), steps=1).initial())
    task = task_of(plan, train.initial(), approve=approve_all)
    assert weights_sha256(task.trainer.initial()) == plan.model
    with pytest.raises(ValueError, match="not the weights that the plan begins with"):
        task_of(plan, {k: t + 1 for k, t in train.initial().items()}, approve=approve_all)


def test_a_run_is_named_by_all_of_its_plan() -> None:
    one = plan_of()
    assert plan_of().run == one.run == Plan.from_json(one.to_json()).run
    others = [plan_of(seed=1), plan_of(rounds=3), plan_of(sites=["a", "c"]), plan_of(strategy=FedProx(mu=0.1)),
              plan_of(trainer(lr=0.5)), plan_of(privacy=TopK()), plan_of(topology=ring), plan_of(admission=Admission())]
    assert len({one.run, *(other.run for other in others)}) == 1 + len(others)
    assert one.modules == ("cohorts", "fedlab.deploy.objects", "fedlab.privacy.aggregation", "fedlab.privacy.base",
                           "fedlab.run.round", "fedlab.strategies.averaging",
                           "fedlab.training.defaults", "fedlab.training.trainer")


class InCell(Privacy):
    """As if of a notebook: no other process finds it."""

    def __init__(self, keep: float = 0.1) -> None:
        self.keep = keep


InCell.__module__ = "__main__"


class Forgetful(Privacy):
    def __init__(self, keep: float = 0.1) -> None:
        self.share = keep


class Doubling(Privacy):
    def __init__(self, keep: float = 0.1) -> None:
        self.keep = 2 * keep


@pytest.mark.parametrize(("value", "error", "words"), [
    (InCell(), PrivacyError, "notebook.*%%writefile"), (Forgetful(), ValueError, "no attribute 'keep'"),
    (lambda p, lr: None, ValueError, "import it"), (np.float64(0.5), ValueError, r"float\(\.\.\.\)"),
    (float("nan"), ValueError, "NaN"), (2**70, ValueError, "64 bits"),
    (Path("/"), ValueError, "in text or numbers"),
    (torch.ones(1), ValueError, "no Tensor"),
    (nn.Conv3d(1, 1, 1), ValueError, "no attribute 'bias'|nobody can tell|built"),
    (networkx.DiGraph([(0, 1)]), ValueError, "undirected"), (partial(torch.optim.SGD, [], 0.1), ValueError, "position"),
], ids=lambda part: getattr(part, "__name__", str(part)))
def test_what_cannot_travel_is_refused_with_the_remedy(value: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make(describe(value), approve=approve_all)


def test_something_that_holds_itself_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(ValueError, match="deep"):
        describe(endless)


def test_plans_that_would_be_made_differently_elsewhere_are_refused_at_the_server() -> None:
    with pytest.raises(ValueError, match="Doubling"):
        plan_of(privacy=Doubling())
    with pytest.raises(ValueError, match="built"):
        plan_of(SiteTrainer(model=nn.Sequential(nn.Conv3d(4, 3, 1)), steps=1))
    changed = segresnet()
    changed.conv_final[2].conv = nn.Conv3d(8, 3, 3, padding=1)
    with pytest.raises(ValueError, match="conv_final"):
        plan_of(SiteTrainer(model=changed, steps=1))
    frozen = segresnet()
    frozen.conv_final[2].conv.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="conv_final"):
        plan_of(SiteTrainer(model=frozen, steps=1))



TRAP = {"make": "fedlab.privacy.base:Privacy", "with": {}}


def call_of(name: str, **settings: Any) -> dict[str, Any]:
    """A call of a function that makes values of plans."""
    return {"make": f"fedlab.deploy.objects:{name}", "with": settings}


HOSTILE = [
    {"make": "os:system", "with": {"command": "touch hacked"}},
    {"make": "subprocess:run", "with": {"args": "touch hacked", "shell": True}},
    {"make": "builtins:eval", "with": {"source": "1"}}, {"name": "builtins:exec"},
    {"make": "fedlab.deploy.plan:os.system", "with": {"command": "touch hacked"}},
    {"make": "fedlab.run.checkpoint:os", "with": {}},
    {"make": "fedlab.run.checkpoint:shutil.rmtree", "with": {"path": "x"}}, {"name": "fedlab.run.checkpoint:shutil"},
    {"make": "fedlab.data.fetch:fetch", "with": {"name": "msd-brain", "out": "x"}},
    {"make": "fedlab.data.phantom.generator:write_brats", "with": {"out": "x"}},
    {"make": "fedlab.apps.cli:main", "with": {}},
    {"make": "fedlab.training.networks:load_model", "with": {"path": "/etc/passwd"}},
    {"make": "fedlab.training.networks:save_model", "with": {}}, {"name": "fedlab.training.networks:save_model"},
    {"make": "fedlab.privacy.accounting.ledger_file:LedgerFile", "with": {"folder": "x", "site": "y"}},
    {"make": "fedlab.privacy.base:_Sum", "with": {}}, {"make": "fedlab.privacy.base:__builtins__", "with": {}},
    {"make": "fedlab.privacy.base:Privacy.__init__", "with": {}},
    {"make": "fedlab.privacy.base:technique_at", "with": {}},
    {"make": "fedlab.privacy.base:PrivacyError", "with": {}}, {"make": "fedlab.privacy.base:Any", "with": {}},
    {"make": "fedlab.privacy.secure_aggregation.crypto:seal", "with": {}},
    {"make": "torch:load", "with": {"f": "x"}}, {"make": "torch.hub:load", "with": {"repo_or_dir": "x", "model": "y"}},
    {"make": "torch.utils.cpp_extension:load", "with": {"name": "x", "sources": []}},
    {"make": "torch.optim.optimizer:functools", "with": {}}, {"make": "monai.bundle.scripts:run", "with": {}},
    {"make": "monai.networks.nets.resnet:ResNetFeatures", "with": {"model_name": "resnet50", "pretrained": True}},
    {"make": "monai.transforms.io.array:SaveImage", "with": {"output_dir": "x"}},
    {"make": "monai.losses.perceptual:PerceptualLoss", "with": {"spatial_dims": 2}},
    {"make": ":x", "with": {}}, {"make": "fedlab.training.networks:", "with": {}}, {"make": "..os:system", "with": {}},
    {"make": "fedlab.training.networks:segresnet\n", "with": {}}, {"make": "fedlab/models:segresnet", "with": {}},
    {"make": "fedlab.training.networks:segresnet", "with": {"filters": 8, "nonsense": 1}},
    {"make": "fedlab.training.networks:segresnet", "with": {"__class__": 1}},
    {"make": "fedlab.training.networks:segresnet"},
    {"make": "fedlab.training.networks:segresnet", "with": [], "and": 1}, {"sum": [TRAP]}, {"sum": [TRAP, 3]},
    {"number": "nan"}, {"dict": [[1]]}, {"dict": [["a", 1], ["a", 2]]}, {"dict": [[[], 1]]}, {"tuple": {}}, {},
    {"x": 1}, call_of("sum_of", techniques=[TRAP]), call_of("sum_of", techniques=[TRAP, 3]),
    call_of("sum_of", techniques=3), call_of("infinity", sign="nan"), call_of("infinity", sign=1),
    call_of("dict_of", pairs=[[1]]), call_of("dict_of", pairs=[["a", 1], ["a", 2]]),
    call_of("dict_of", pairs=[[[], 1]]), call_of("dict_of", pairs=3), call_of("tuple_of", items=3),
    call_of("graph_of", nodes=[1], edges=[[1, 2]]), call_of("graph_of", nodes=[[1]], edges=[]),
    call_of("graph_of", nodes=[1], edges=[[1]]), call_of("make", plan=1), call_of("built", factory=1),
    {"graph": {"nodes": [1], "edges": [[1, 2]]}}, {"graph": {"nodes": [[1]], "edges": []}},
    {"partial": "os:system", "with": {}}, 2**64, float("inf"), float("nan"), b"bytes", {"name": "a" * 400 + ":b"},
]


@pytest.mark.parametrize("plan", HOSTILE, ids=lambda p: str(p)[:50])
def test_hostile_plans_are_refused(plan: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def approve(module: str) -> None:  # as strict as a site is: see fedlab.deploy.policy
        if module.partition(".")[0] not in ("fedlab", "torch", "monai"):
            raise PrivacyError(f"{module} is not approved")

    with pytest.raises((PrivacyError, ValueError)):
        make(plan, approve=approve)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("place", [0, 1])
def test_nothing_is_imported_while_any_part_of_a_plan_is_bad(place: int, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"h2_marks_its_import_{place}"
    (tmp_path / f"{name}.py").write_text("import pathlib\npathlib.Path('imported').touch()\n"
                                                     "import torch\nclass thing(torch.nn.Module): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    parts: list[Any] = [{"name": f"{name}:thing"}]
    parts.insert(place, {"make": "fedlab.training.networks:load_model", "with": {}})
    with pytest.raises(PrivacyError, match="no place in a plan"):
        make(parts, approve=approve_all)
    with pytest.raises(PrivacyError, match="not approved"):
        make(parts[1 - place], approve=refuse_all)
    assert not (tmp_path / "imported").exists() and name not in sys.modules
    make(parts[1 - place], approve=approve_all)  # the trap does work
    assert (tmp_path / "imported").exists()


def test_names_are_taken_only_where_they_are_defined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "h2_imports_others.py").write_text("from os import system\nfrom pathlib import Path\nx = 3\n"
                                                   "import torch\nclass Own(torch.nn.Module):\n    pass\nAlias = Own\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("system", "Path", "x", "Alias", "gone"):
        with pytest.raises(PrivacyError, match="no class or function that h2_imports_others defines"):
            make({"name": f"h2_imports_others:{name}"}, approve=approve_all)
    assert make({"name": "h2_imports_others:Own"}, approve=approve_all).__name__ == "Own"


def test_deep_and_wide_plans_are_refused_without_recursion() -> None:
    deep: Any = 1
    for _ in range(5000):
        deep = [deep]
    for plan in (deep, [0] * 30_000, call_of("tuple_of", items=[[0] * 200] * 200)):
        with pytest.raises(ValueError, match="at most"):
            make(plan, approve=approve_all)


def test_a_model_far_larger_than_its_weights_is_refused_before_it_takes_memory() -> None:
    plan = plan_of(SiteTrainer(model=segresnet(), steps=1))
    note = json.loads(plan.to_json())
    note["trainer"]["with"]["model"]["with"]["filters"] = 8 * 4096  # some 20 million million weights
    with pytest.raises(ValueError, match="another model"):
        task_of(Plan.from_json(json.dumps(note)), SiteTrainer(model=segresnet(), steps=1).initial(),
                approve=approve_all)


@pytest.mark.parametrize(("where", "value", "words"), [
    ("privacy", {"make": "fedlab.strategies.averaging:FedAvg", "with": {}}, "a privacy technique"),
    ("strategy", {"make": "fedlab.privacy.base:Privacy", "with": {}}, "strategy"), ("trainer", 3, "a SiteTrainer"),
    ("trainer", {"make": "fedlab.training.networks:segresnet", "with": {}}, "a SiteTrainer"),
    ("strategy", None, "strategy"),
    ("admission", {"name": "os:system"}, "not approved"),
])
def test_every_part_of_a_plan_is_of_its_kind(where: str, value: Any, words: str) -> None:
    note = {**json.loads(plan_of().to_json()), where: value}

    def approve(module: str) -> None:
        if module == "os":
            raise PrivacyError("os is not approved")

    with pytest.raises((ValueError, PrivacyError), match=words):
        task_of(Plan.from_json(json.dumps(note)), trainer().initial(), approve=approve)


def changed(**more: Any) -> str:
    return json.dumps({**json.loads(plan_of().to_json()), **more})


@pytest.mark.parametrize("text", [
    "", "null", "[]", "{}", "[" * 100_000, '{"a": NaN}', '{"format": "fedlab-plan-2", "format": "fedlab-plan-2"}',
    changed(rounds=0), changed(rounds=True), changed(rounds=2**70), changed(rounds=1.5), changed(rounds="2"),
    changed(seed=None), changed(sites=[]), changed(sites=["a", "a"]), changed(sites=["\x1b[2J"]), changed(sites="ab"),
    changed(sites=[1]), changed(model="../" * 10), changed(model=None), changed(more=1),
    changed(format="fedlab-plan-9"),
    changed(privacy={"make": "x"}), changed(privacy={"a": "b"}), "\ud800",
], ids=lambda t: repr(t)[:40])
def test_text_that_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(FedlabError, match="the server was refused"):
        Plan.from_json(text)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_changed_plans_raise_nothing_but_what_says_so(data: st.DataObject) -> None:
    text = bytearray(PLAN.encode())
    for _ in range(data.draw(st.integers(1, 3))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 127))
    try:
        task_of(Plan.from_json(text.decode()), START, approve=refuse_all)
    except (FedlabError, ValueError):
        pass


START = trainer().initial()
PLAN = plan_of().to_json()


def test_built_notes_only_what_can_travel() -> None:
    model = built(UNet, spatial_dims=3, in_channels=4, out_channels=3, channels=(8, 16), strides=(2,))
    assert repr(again(model)) == repr(model)
    assert describe(again(model)) == describe(model)
    with pytest.raises(ValueError, match="import it"):
        built(lambda: TinyNet())
    with pytest.raises(ValueError, match="in text or numbers"):
        built(TinyNet, seed=Path("x"))
    with pytest.raises(ValueError, match="no attributes"):
        built(weights_sha256, params={})


def test_another_process_makes_the_same_run_of_a_plan(tmp_path: Path) -> None:
    train = SiteTrainer(model=segresnet(), steps=1, lr=PolyDecay(start=0.1, rounds=3))
    plan = plan_of(train, privacy=SharePercentile() + TopK(keep=0.5), topology=Gossip(graph=networkx.path_graph(2)))
    from fedlab.deploy.messages import pack_weights

    (tmp_path / "plan.json").write_text(plan.to_json(), encoding="utf-8")
    (tmp_path / "start").write_bytes(pack_weights(train.initial()))
    code = ("from pathlib import Path\nfrom fedlab.deploy.plan import Plan\n"
            "from fedlab.deploy.messages import unpack_weights\nfrom fedlab.run import make_run\n"
            "plan = Plan.from_json(Path('plan.json').read_text())\nok = lambda module: None\n"
            "run = make_run(**plan.parts(unpack_weights(Path('start').read_bytes()), approve=ok))\n"
            "print(plan.run, run.task, run.topology, sep='\\n')")
    told = subprocess.run([*PYTHON, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True,
                          timeout=400)
    here = task_of(plan, train.initial(), approve=approve_all)
    assert told.stdout.strip() == f"{plan.run}\n{here}\n{Gossip(graph=networkx.path_graph(2))}"


