"""A limit that a site states in site.toml is a limit: every key is checked when it is read, and holds against plans."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

import fedlab.privacy
from fedlab import DPSGD, Privacy, PrivacyError, SecureAggregation
from fedlab.core.errors import RunError
from fedlab.deploy.policy import Budget, Required, SitePolicy
from fedlab.deploy.settings import read_settings
from fedlab.privacy import (
    SVT,
    AdaptiveClip,
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
from fedlab.privacy.aggregation import Aggregation

#: An example of every technique and aggregation that a site can require.
EXAMPLES: dict[str, Any] = {
    "DPSGD": DPSGD(clip=2.0, noise_multiplier=2.0, delta=0.1, sample_rate=0.5, crops=2, max_epsilon=50.0),
    "LocalGaussian": LocalGaussian(clip=2.0, noise_multiplier=2.0, delta=0.1, max_epsilon=50.0),
    "CentralGaussian": CentralGaussian(clip=2.0, noise_multiplier=2.0, delta=0.1, max_epsilon=50.0),
    "SVT": SVT(fraction=0.5, epsilon_threshold=2.0, epsilon_release=2.0, epsilon_query=2.0, clip=2.0, threshold=2.0,
               delta=0.1, max_epsilon=50.0),
    "SparseVector": SparseVector(fraction=0.5, epsilon=2.0, rounds=2, clip=2.0, threshold=2.0, delta=0.1,
                                 max_epsilon=50.0),
    "PartialSharing": PartialSharing(fraction=0.5, clip=2.0), "SharePercentile": SharePercentile(keep=0.5, bound=2.0),
    "Quantise": Quantise(bits=8), "ScaledSign": ScaledSign(), "TopK": TopK(keep=0.5),
    "PersonalLayers": PersonalLayers(names=["last*"]),
    "SecureAggregation": SecureAggregation(threshold=3, clip=2.0, noise_multiplier=2.0, delta=0.1, max_epsilon=50.0,
                                           sites=4),
}
#: Every setting that is a number, by technique.
NUMBERS = [(name, setting) for name, example in EXAMPLES.items() for setting in inspect.signature(
    type(example)).parameters if isinstance(value := getattr(example, setting), int | float)
    and not isinstance(value, bool)]
FIXED = [(name, setting) for name, example in EXAMPLES.items() for setting in inspect.signature(
    type(example)).parameters if getattr(example, setting) is not None]


def refused(required: Required, part: Any) -> str | None:
    """Why a plan with this part is refused, or None."""
    privacy, aggregation = (Privacy(), part) if isinstance(part, Aggregation) else (part, Aggregation())
    try:
        required.check(privacy, aggregation)
    except PrivacyError as error:
        return str(error)
    return None


def test_the_examples_leave_nothing_out() -> None:
    kinds = {name for name in dir(fedlab.privacy) if isinstance(found := getattr(fedlab.privacy, name), type)
             and issubclass(found, Privacy | Aggregation)}
    assert kinds == EXAMPLES.keys() | {"Privacy", "Aggregation", "AtSites"} and len(NUMBERS) > 40


@pytest.mark.parametrize(("technique", "setting"), NUMBERS)
def test_every_limit_of_every_setting_is_kept(technique: str, setting: str) -> None:
    part, value = EXAMPLES[technique], getattr(EXAMPLES[technique], setting)
    for kind, limit, holds in (("min_", value, True), ("max_", value, True), ("min_", value * 1.01 + 1e-9, False),
                               ("max_", value * 0.99 - 1e-9 if value else None, False), ("", value, True),
                               ("", value * 1.01 + 1, False)):
        if limit is None or (kind, setting) == ("max_", "epsilon"):  # max_epsilon limits the budget of that name
            continue
        name = setting if (kind, setting) == ("max_", "max_epsilon") else f"{kind}{setting}"
        found = refused(Required.read({"technique": technique, name: limit}), part)
        assert (found is None) is (holds or (kind == "" and setting == "max_epsilon" and value <= limit)), (name, limit)
        if found is not None:
            assert f"insists on {technique} with {setting} of" in found and f"the plan has {value!r}" in found


@pytest.mark.parametrize(("technique", "setting"), FIXED)
def test_every_fixed_value_is_kept(technique: str, setting: str) -> None:
    part, value = EXAMPLES[technique], getattr(EXAMPLES[technique], setting)
    as_toml = list(value) if isinstance(value, tuple) else value
    assert refused(Required.read({"technique": technique, setting: as_toml}), part) is None
    if isinstance(value, bool):
        assert refused(Required.read({"technique": technique, setting: not value}), part) is not None
    if isinstance(value, str | list):
        other = value + type(value)("x")
        assert refused(Required.read({"technique": technique, setting: other}), part) is not None


def test_a_budget_that_a_plan_leaves_open_is_not_within_a_limit() -> None:
    """The key that was once dropped without a word."""
    required = Required.read({"technique": "DPSGD", "max_epsilon": 1.0})
    assert required == Required(technique="DPSGD", most={"max_epsilon": 1.0})
    for budget, fits in ((None, False), (1.5, False), (1.0, True), (0.5, True)):
        part = DPSGD(clip=1.0, noise_multiplier=50.0, delta=0.1, sample_rate=0.1, max_epsilon=budget)
        assert (refused(required, part) is None) is fits


def test_a_clip_that_adapts_is_limited_at_its_start() -> None:
    adaptive = DPSGD(clip=AdaptiveClip(start=2.0, bit_noise=4.0), noise_multiplier=2.0, delta=0.1, sample_rate=0.5)
    for limit, fits in (({"max_clip": 2.0}, True), ({"max_clip": 1.9}, False), ({"min_clip": 2.1}, False),
                        ({"clip": 2.0}, False)):
        assert (refused(Required.read({"technique": "DPSGD", **limit}), adaptive) is None) is fits


def test_of_two_parts_of_a_required_technique_both_are_within_the_limits() -> None:
    required = Required.read({"technique": "LocalGaussian", "max_clip": 2.0})
    narrow, wide = (LocalGaussian(clip=clip, noise_multiplier=4.0, delta=0.01) for clip in (1.0, 9.0))
    assert refused(required, narrow + narrow) is None
    for both in (narrow + wide, wide + narrow):
        assert "with clip of at most 2.0, the plan has 9.0" in str(refused(required, both))


@pytest.mark.parametrize(("table", "words"), [
    ({"technique": "DPSDG"}, r"did you mean 'DPSGD'\?"), ({"technique": "dpsgd"}, "no technique 'dpsgd'"),
    ({"technique": "SecureAggregaton"}, "did you mean 'SecureAggregation'"), ({"technique": "Ledger"}, "no technique"),
    ({"technique": "Privacy"}, "no technique"), ({"technique": "fedlab.privacy.base:Nothing"}, "no technique"),
    ({"technique": ""}, "name of a class"), ({"technique": 3}, "name of a class"), ({}, "name or a table"),
    ({"technique": "DPSGD", "min_noise": 1.0}, r"no setting 'noise' \(did you mean 'noise_multiplier'\?\)"),
    ({"technique": "DPSGD", "noise_multipler": 1.0}, "did you mean 'noise_multiplier'"),
    ({"technique": "DPSGD", "max_epsilom": 1.0}, "no setting 'epsilom'"),
    ({"technique": "DPSGD", "min_epsilon": 1.0}, "no setting 'epsilon'"),
    ({"technique": "TopK", "max_epsilon": 1.0}, "TopK has no setting 'max_epsilon'"),
    ({"technique": "DPSGD", "max_": 1.0}, "no setting ''"), ({"technique": "DPSGD", "exactly": {}}, "no setting"),
    ({"technique": "DPSGD", "max_epsilon": 1.0, "max_max_epsilon": 9.0}, "given twice"),
    ({"technique": "DPSGD", "min_clip": 2.0, "max_clip": 1.0}, "no value of DPSGD's clip"),
    ({"technique": "DPSGD", "clip": 2.0, "max_clip": 3.0}, "no value of DPSGD's clip"),
    *(({"technique": "DPSGD", f"{kind}{name}": wrong}, "is a number of at least 0")
      for kind in ("min_", "max_") for name in ("clip", "noise_multiplier")
      for wrong in (-1.0, float("nan"), float("inf"), True, "1", None, [1.0], {})),
    *(({"technique": "DPSGD", "max_epsilon": wrong}, "is a number of at least 0")
      for wrong in (-1, float("nan"), float("inf"), False, "1.0", [1])),
    ({"technique": "DPSGD", "clip": float("nan")}, "finite"), ({"technique": "DPSGD", "clip": float("inf")}, "finite"),
    ({"technique": "DPSGD", "clip": True}, "another type"), ({"technique": "DPSGD", "clip": "1.0"}, "another type"),
    ({"technique": "DPSGD", "secure_mode": 1}, "another type"), ({"technique": "DPSGD", "secure_mode": "true"}, "type"),
    ({"technique": "DPSGD", "min_secure_mode": 1}, "without min_ or max_"),
    ({"technique": "DPSGD", "max_accountant": 1}, "without min_ or max_"),
    ({"technique": "DPSGD", "accountant": 1}, "another type"), ({"technique": "DPSGD", "crops": [2]}, "another type"),
    (["DPSGD"], "name or a table"), (3, "name or a table"), (None, "name or a table"), (True, "name or a table"),
], ids=str)
def test_a_limit_that_nobody_would_check_is_refused_when_it_is_read(table: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Required.read(table)


def test_a_technique_of_a_file_is_named_with_its_module() -> None:
    required = Required.read({"technique": "my_file:Mine", "min_strength": 2, "secret": "x"})
    assert required == Required(technique="my_file:Mine", least={"strength": 2}, exactly={"secret": "x"})
    assert Required.read("fedlab.privacy.dp.dpsgd:DPSGD").technique == "fedlab.privacy.dp.dpsgd:DPSGD"


@pytest.mark.parametrize(("policy", "words"), [
    ("max_step = 3", "did you mean 'max_steps'"), ("max_update = 3", "did you mean 'max_updates'"),
    ("requires = ['DPSGD']", "did you mean 'require'"), ("require = 'DPSGD'", "are lists"),
    ("installed = 'os'", "are lists"), ("installed = [3]", "names of modules"), ("max_steps = true", "max_steps"),
    ("max_steps = 0", "max_steps"), ("max_batch = nan", "max_batch"), ("max_passes = -1", "max_passes"),
    ("broadcast_clip = 3.0", "broadcast_clip"), ("broadcast_clip = [2.0, 1.0]", "broadcast_clip"),
    ("broadcast_clip = [1.0, inf]", "broadcast_clip"), ("max_crops = '2'", "max_crops"), ("budgets = {}", "budget"),
    ("require = [{technique = 'DPSGD', min_noise = 1.0}]", "did you mean 'noise_multiplier'"),
    ("require = ['DPSDG']", "did you mean 'DPSGD'"), ("max_updates = 1.5", "max_updates"),
    ("[policy.budget.patient]\nmax_epsilon = nan\ndelta = 0.1", "positive epsilon"),
    ("[policy.budget.patient]\nmax_epsilon = true\ndelta = 0.1", "positive epsilon"),
    ("[polcy]\nmax_steps = 3", r"did you mean 'policy'\?"),
])
def test_a_key_that_fedlab_does_not_know_is_refused_with_the_one_that_was_meant(tmp_path: Path, policy: str,
                                                                                words: str) -> None:
    (tmp_path / "site.toml").write_text(f"[site]\nname = 'a'\ndata = 'x'\n[policy]\n{policy}\n", encoding="utf-8")
    with pytest.raises((ValueError, RunError), match=words):
        read_settings(tmp_path)


def test_the_keys_of_a_policy_are_read() -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "site.toml").write_text(
            "[site]\nname = 'a'\ndata = 'x'\n[policy]\nmax_steps = 4\nmax_batch = 2.5\nmax_crops = 3\nmax_passes = 2\n"
            "broadcast_clip = [0.5, 2.0]\nmax_updates = 7\ninstalled = ['x.y']\nrequire = ['DPSGD']\n"
            "[policy.budget.site]\nmax_epsilon = 3.0\ndelta = 0.01\n", encoding="utf-8")
        policy = read_settings(folder).policy
    assert policy == SitePolicy(max_steps=4, max_batch=2.5, max_crops=3, max_passes=2, broadcast_clip=(0.5, 2.0),
                                max_updates=7, installed=("x.y",), require=(Required(technique="DPSGD"),),
                                budgets={"site": Budget(epsilon=3.0, delta=0.01)})
