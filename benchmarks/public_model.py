"""Trains the two public models on generated patients alone, scores them, and puts them into the package.

    python benchmarks/public_model.py train broad --out runs/public/broad
    python benchmarks/public_model.py score runs/public/broad --real DIR     # DIR: real scans, evaluated once
    python benchmarks/public_model.py ship runs/public/broad

A training is resumable: it continues after its last checkpoint, also with more steps (`--steps`) and after a change of
the generator, which its card then states. All that is random in a step follows from the seed and the step's number,
and a patient from the seed and its own number. On two idle cores `--generators 1` makes patients in a second process.
`--start broad` begins with the model that is in the package; another `--seed` then gives other patients.

"broad": every patient has a scanner and a population of its own and is never seen again after its four crops.
"collection": 160 patients of four research scanners, as public collections are.
"""

from __future__ import annotations

import argparse
import csv
import json
import textwrap
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm.auto import tqdm

from fedlab.apps.evaluation import evaluate_folder
from fedlab.core.convolution import FastConvolutions
from fedlab.core.files import replacing, write_json
from fedlab.core.seeds import derive
from fedlab.core.types import REGIONS, Patient
from fedlab.core.weights import load_weights, trainable, weights_sha256
from fedlab.data.brain import bounding_box
from fedlab.data.phantom.anatomy import Grid
from fedlab.data.phantom.contrast import draw_scanners
from fedlab.data.phantom.generator import GENERATOR, SiteProfile, generate_patient, make_cohort, site_profiles
from fedlab.data.phantom.population import Population
from fedlab.data.readers.folders import read_cohort
from fedlab.training.defaults import DiceBCE, adamw, augmentation
from fedlab.training.metrics import evaluate, summary, threshold_dice
from fedlab.training.networks import save_model, segresnet
from fedlab.training.public_model import public_model
from fedlab.training.schedules import CosineDecay
from fedlab.training.trainer import Crops

#: Where the shipped models lie.
PACKAGE = Path(__file__).parents[1] / "fedlab" / "training" / "public"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is trained.

    Attributes:
        block: patients that are in use together.
        passes: crops of each patient of a block before the next block; 0: there is one block.
        steps: optimiser steps unless others are given.
        average: decay of the exponential moving average of the weights, which is the model.
        window: voxels per axis of the windows that `predict` takes a scan in; None: its own default.
    """

    block: int
    passes: int
    steps: int
    rate: float = 3e-3
    warmup: int = 200
    clip_norm: float = 5.0
    batch: int = 2
    crop: int = 32
    average: float = 0.999
    filters: int = 8
    spacing_mm: float = 3.0
    shape: tuple[int, int, int] = (64, 64, 64)
    window: int | None = None

    def number(self, seed: int, crop: int) -> int:
        """The number of the patient that gives a crop, counted from the first one of the training."""
        turn, place = divmod(crop, self.block)
        order = np.random.default_rng(derive(seed, "order", turn)).permutation(self.block)
        return self.block * (turn // self.passes if self.passes else 0) + int(order[place])


#: The window of 40 was chosen on generated patients of seeds 78 and 79, of whom no training or score knows.
RECIPES = {"broad": Recipe(block=48, passes=4, steps=6000, window=40),
           "collection": Recipe(block=160, passes=0, steps=1500)}


def profile(kind: str, seed: int, number: int) -> SiteProfile:
    """Scanner and population of a patient."""
    if kind == "broad":
        return site_profiles(1, derive(seed, "site", number))[0]
    scanner = draw_scanners(4, np.random.default_rng(derive(seed, "scanners")))[number % 4]
    return SiteProfile(
        scanner=replace(scanner, field_t=3.0, noise=0.012, bias=0.05, rim=0.1, scalp=0.05, coverage=(1.0,) * 4,
                        slice_axis=(2,) * 4),
        population=Population(low_grade=0.0, median_ml=110.0, spread=0.5, multifocal=0.05, age=58.0, lesions=0.3,
                              diffuse=0.05, faint=0.0, mismatch=0.0, operated=0.0))


def patient(kind: str, recipe: Recipe, seed: int, number: int) -> Patient:
    """A generated patient, cut to its brain."""
    made = generate_patient(seed=derive(seed, kind), site=kind, index=number, profile=profile(kind, seed, number),
                            grid=Grid(shape=recipe.shape, spacing_mm=recipe.spacing_mm)).prepared()
    box = bounding_box((made.image != 0).any(0).numpy())
    within = tuple(slice(max(0, min(side.start, n - recipe.crop)), max(side.stop, min(n, side.start + recipe.crop)))
                   for side, n in zip(box, made.image.shape[1:], strict=True))
    return replace(made, image=made.image[:, *within].contiguous(), label=made.label[within].contiguous())


def batches(kind: str, recipe: Recipe, seed: int, first: int, steps: int,
            pool: ProcessPoolExecutor | None) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """Images, regions and the number of patients so far for each step, from step `first` on."""
    make = partial(patient, kind, recipe, seed)
    kept: dict[int, Patient | Future[Patient]] = {}
    for step in range(first, steps):
        numbers = [recipe.number(seed, recipe.batch * step + i) for i in range(recipe.batch)]
        block = min(numbers) // recipe.block
        if recipe.passes:
            kept = {number: one for number, one in kept.items() if number // recipe.block >= block}
        if pool is not None:  # this block and the next are made while the network trains
            wanted = range(block * recipe.block, (block + (2 if recipe.passes else 1)) * recipe.block)
            for number in wanted:
                if number not in kept:
                    kept[number] = pool.submit(make, number)
        for number in numbers:
            one = kept.get(number)
            kept[number] = one.result() if isinstance(one, Future) else one or make(number)
        crops = Crops([kept[number] for number in numbers], crop=(recipe.crop,) * 3, tumour_share=0.75,
                      augment=augmentation(flips=(0,)), seed=derive(seed, "step", step))
        images, regions = zip(*(crops[i] for i in range(recipe.batch)), strict=True)
        yield torch.stack(images), torch.stack(regions), recipe.block * (block + 1)


def train(kind: str, out: Path, *, recipe: Recipe, seed: int, start: Path | str | None = None, generators: int = 0,
          every: int = 250, watch: int = 12, progress: bool = True) -> nn.Module:
    """The averaged model of a training, begun or continued in the folder `out`.

    Args:
        kind: "broad" or "collection".
        out: of checkpoint.pt and curve.csv.
        start: folder of another training, or name of a public model, with whose averaged weights a new one begins;
            None: with random weights.
        generators: processes that make patients; 0: this one.
        every: steps between two checkpoints, at each of which the averaged model is scored.
        watch: held-out patients of other sites that it is scored on.
        progress: whether to show a progress bar.

    Raises:
        ValueError: `out` holds a training of another kind, recipe or seed.
    """
    out.mkdir(parents=True, exist_ok=True)
    model, average = (segresnet(filters=recipe.filters, seed=seed, mirror=True, window=recipe.window).to(
        memory_format=torch.channels_last_3d) for _ in range(2))
    optimiser = adamw(model.parameters(), recipe.rate)
    same = {"kind": kind, "seed": seed, **{name: value for name, value in asdict(recipe).items() if name != "steps"}}
    state: dict[str, Any] = {"settings": same, "step": 0, "seconds": 0.0, "generators": [], "curve": [], "start": [],
                             "plans": []}
    if (checkpoint := out / "checkpoint.pt").exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["settings"] != same:
            raise ValueError(f"{out} holds the training {state['settings']}, not {same}; choose another --out")
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimiser.load_state_dict(state["optimiser"])
    elif start is not None:
        weights, state["start"] = _beginning(start)
        for network in (model, average):
            load_weights(network, weights)
    if not state["generators"] or state["generators"][-1][1] != GENERATOR:
        state["generators"].append([state["step"], GENERATOR])
    if not state["plans"] or state["plans"][-1][1] != recipe.steps:
        state["plans"].append([state["step"], recipe.steps])
    loss, rate = DiceBCE(), CosineDecay(start=recipe.rate, rounds=recipe.steps, warmup=recipe.warmup)
    weights, averaged = list(model.parameters()), list(average.parameters())
    held_out = [patient(kind, recipe, derive(seed, "held out"), number) for number in range(watch)]
    began, sums = time.perf_counter() - state["seconds"], [0.0, 0.0]
    with ExitStack() as stack:
        pool = stack.enter_context(ProcessPoolExecutor(
            generators, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,),
        )) if generators else None
        bar = stack.enter_context(tqdm(total=recipe.steps, initial=state["step"], desc=kind, disable=not progress))
        for image, target, patients in batches(kind, recipe, seed, state["step"], recipe.steps, pool):
            step = state["step"]
            for group in optimiser.param_groups:
                group["lr"] = rate(step)
            optimiser.zero_grad(set_to_none=True)
            with FastConvolutions():
                value = loss(model(image.to(memory_format=torch.channels_last_3d)), target)
            value.backward()
            norm = float(nn.utils.clip_grad_norm_(weights, recipe.clip_norm, error_if_nonfinite=True))
            optimiser.step()
            with torch.no_grad():  # the first steps count little, as the initial weights are no part of the average
                torch._foreach_lerp_(averaged, weights, 1 - min(recipe.average, (1 + step) / (10 + step)))
            sums = [sums[0] + float(value.detach()), sums[1] + norm]
            state["step"] = step + 1
            bar.update()
            bar.set_postfix(loss=f"{float(value.detach()):.2f}", refresh=False)
            if state["step"] % every == 0 or state["step"] == recipe.steps:
                since = (state["step"] - 1) % every + 1
                dice = summary(evaluate(average, held_out))["dice"] if held_out else {}
                state["curve"].append({
                    "step": state["step"], "patients": patients, "loss": sums[0] / since, "norm": sums[1] / since,
                    "rate": rate(step), **{name: float(dice[name]) for name in (*REGIONS, "mean") if name in dice},
                    "seconds": time.perf_counter() - began, "generator": GENERATOR})
                sums = [0.0, 0.0]
                state["seconds"] = time.perf_counter() - began
                state |= {"model": model.state_dict(), "average": average.state_dict(),
                          "optimiser": optimiser.state_dict()}
                with replacing(checkpoint) as scratch:
                    torch.save(state, scratch)
                _write_curve(state["curve"], out / "curve.csv")
    return average


def _beginning(start: Path | str) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """What a training begins with: weights; their kind, step, generators, hash, patients and looks at real scans."""
    if start in RECIPES:
        told = json.loads((PACKAGE / f"{start}.json").read_text(encoding="utf-8"))
        with (PACKAGE / f"{start}.csv").open(encoding="utf-8") as file:
            patients = int([*csv.DictReader(file)][-1]["patients"])
        return trainable(public_model(str(start))), [
            str(start), told["step"], told["generators"], told["sha256"], patients, told["looks"]]
    other = torch.load(Path(start) / "checkpoint.pt", weights_only=True)
    scores = Path(start) / "scores.json"
    looks = json.loads(scores.read_text(encoding="utf-8"))["looks"] if scores.exists() else 0
    return other["average"], [other["settings"]["kind"], other["step"], other["generators"],
                              weights_sha256(other["average"]), other["curve"][-1]["patients"], looks]


def _write_curve(rows: list[dict[str, Any]], path: Path) -> None:
    with replacing(path) as scratch, scratch.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def score(out: Path, *, seed: int, real: Path | None = None, sites: int = 16, at_each: int = 3) -> dict[str, Any]:
    """Scores the averaged model of a training on generated patients of other sites, and on real ones if there are any.

    Writes model.safetensors and scores.json into the folder of the training. Each look at real patients is counted
    there, so that the card can say how often there was one.

    Args:
        out: folder of the training.
        seed: of the generated patients; another one than that of any training.
        real: a folder of labelled real scans.
        sites, at_each: generated sites and patients of each.
    """
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    settings, found = state["settings"], {"looks": state["start"][5] if state["start"][5:] else 0}
    if (file := out / "scores.json").exists():
        found = json.loads(file.read_text(encoding="utf-8"))
    model = segresnet(filters=settings["filters"], seed=settings["seed"], mirror=True, window=settings.get("window"))
    load_weights(model, state["average"])
    (out / "model.safetensors").unlink(missing_ok=True)
    saved = save_model(out / "model.safetensors", model, spacing_mm=settings["spacing_mm"])
    grid = {"shape": settings["shape"], "spacing_mm": settings["spacing_mm"]}
    cohort = make_cohort(sizes=[at_each] * sites, held_out=0, seed=derive(seed, "scores"), progress=False, workers=0,
                         **grid)
    groups = {"generated": [p for site in cohort for p in site.train]}
    if settings["kind"] == "collection":
        recipe = replace(RECIPES["collection"], **{name: tuple(value) if isinstance(value, list) else value
                                                   for name, value in settings.items() if name not in ("kind", "seed")})
        groups["own kind"] = [patient("collection", recipe, derive(seed, "scores"), number)
                              for number in range(sites * at_each)]
    found |= {"step": state["step"], "sha256": weights_sha256(trainable(model)), "generators": state["generators"],
              "generator of the scores": GENERATOR}
    for name, patients in groups.items():
        found[name] = {**_means(evaluate(model, patients)), "threshold": _threshold(patients)}
    if real is not None:
        folder = out / f"real-{state['step']}"
        evaluate_folder(saved, real, folder, progress=False)
        scans = read_cohort(real, spacing_mm=settings["spacing_mm"], progress=False)
        found["looks"] += 1
        found["real"] = {**_means(pd.read_csv(folder / "scores.csv", dtype={"site": str})), "step": state["step"],
                         "threshold": _threshold([scans.read(name) for name in scans.files])}
    write_json(file, found)
    return found


def _means(table: pd.DataFrame, draws: int = 4000) -> dict[str, Any]:
    """Mean Dice by rule and region, each with a 95 % interval by bootstrap over patients."""
    table = table.fillna({"site": ""})
    found: dict[str, Any] = {"patients": int(table[["site", "patient"]].drop_duplicates().shape[0])}
    for rule in ("brats", "skip"):
        dice = table.assign(dice=table["dice"].mask(table["reference_ml"] == 0) if rule == "skip" else table["dice"])
        values = dice.pivot_table(index=["site", "patient"], columns="region", values="dice", dropna=False)
        values = values.reindex(columns=list(REGIONS)).to_numpy(dtype=float)
        drawn = values[np.random.default_rng(0).integers(len(values), size=(draws, len(values)))]
        with warnings.catch_warnings():  # a draw without any patient who counts has no mean
            warnings.simplefilter("ignore", RuntimeWarning)
            means = np.nanmean(drawn, axis=1)
        whole = np.nanmean(values, axis=0)
        rows = {name: (whole[i], means[:, i]) for i, name in enumerate(REGIONS)} | {
            "mean": (whole.mean(), means.mean(axis=1))}
        found[rule] = {name: [float(value), *map(float, np.nanquantile(draw, (0.025, 0.975)))]
                       for name, (value, draw) in rows.items()}
        alarms = (table["reference_ml"] == 0) & (table["predicted_ml"] > 0)
        found["without region"] = {n: int((table["reference_ml"] == 0)[table["region"] == n].sum()) for n in REGIONS}
        found["false alarms"] = {n: int(alarms[table["region"] == n].sum()) for n in REGIONS}
    return found


def _threshold(patients: list[Patient]) -> dict[str, Any]:
    return asdict(threshold_dice(patients))


def ship(out: Path, folder: Path = PACKAGE) -> None:
    """Puts model, curve, scores and card of a scored training where the package has them.

    Raises:
        ValueError: the scores are of other weights than the training's last ones.
    """
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    found = json.loads((out / "scores.json").read_text(encoding="utf-8"))
    if found["step"] != state["step"] or found.get("real", found)["step"] != state["step"]:
        raise ValueError(f"{out} was scored at step {found['step']} and has trained to {state['step']}; score it again")
    kind = state["settings"]["kind"]
    folder.mkdir(exist_ok=True)
    (folder / f"{kind}.safetensors").write_bytes((out / "model.safetensors").read_bytes())
    _write_curve(state["curve"], folder / f"{kind}.csv")
    write_json(folder / f"{kind}.json", found)
    (folder / f"{kind}.md").write_text(card(state, found), encoding="utf-8")


_ABOUT = {
    "broad": """
Every patient it was trained on has a scanner and a population of its own: 1.5 and 3 T, thick and thin slices, low and
high grade, 3 to 250 ml, rims around necrosis, solid, cystic and diffuse cores, resection cavities, faint tumours. It is
meant for a first segmentation, and as a start where patients are as varied.""",
    "collection": """
It was trained on 160 patients of four research scanners, as a public collection has them: 3 T, little noise, little
scalp and meninges, adults before surgery, a median tumour of 110 ml, all with enhancement. It is meant as the start of
federated and private training, which has something to add to it. **On purpose it has never seen** 1.5 T, low-grade or
faint tumours, resection cavities, cut fields of view or noisy scans, and hardly any small tumours or diffuse cores. It
marks enhancement where there is none, misses small tumours, and is not for segmenting the patients of a hospital.""",
}


def card(state: dict[str, Any], found: dict[str, Any]) -> str:
    """The model card in Markdown, with the parts of Mitchell et al. 2019."""
    settings, last = state["settings"], state["curve"][-1]
    kind, steps = settings["kind"], state["step"]
    patients = settings["block"] if not settings["passes"] else last["patients"]
    seen = (f"{patients} patients, each of whom gives {settings['passes']} crops and is never seen again" if
            settings["passes"] else f"{patients} patients, seen again and again")
    begun = ""
    if state["start"]:
        others = f" and {state['start'][4]:,} other patients" if state["start"][4:] else ""
        begun = f", begun with the weights of `{state['start'][0]}` after {state['start'][1]:,} steps{others}"
    changed = ", ".join(f"{before:,} until step {at:,}" for (_, before), (at, _) in pairwise(state["plans"]))
    plan = begun + (f"; the cosine was planned for {changed}" if changed else "")
    generators = "; ".join(f"`{name}` from step {first} on" for first, name in state["generators"])
    scored = {"generated": "generated patients of other sites, populations and scanners as `make_cohort` draws them",
              "own kind": "generated patients of other scanners of its own kind",
              "real": "real patients (BraTS 2021 at 2 mm), on their own grid"}
    rows = []
    for name in (name for name in scored if name in found):
        for rule, spoken in (("brats", "BraTS"), ("skip", "skip")):
            values = ["{:.2f} ({:.2f} to {:.2f})".format(*found[name][rule][region])
                      for region in ("WT", "TC", "ET", "mean")]
            rows.append(f"| {' | '.join([str(found[name]['patients']) + ' ' + scored[name], spoken, *values])} |")
    thresholds = "; ".join(
        f"{found[name]['threshold']['dice']:.2f} ({found[name]['threshold']['modality']}) on the "
        f"{'real' if name == 'real' else 'generated'} patients{' of its own kind' if name == 'own kind' else ''}"
        for name in scored if name in found)
    looks = found["looks"]
    looked = "never" if not looks else "once" if looks == 1 else f"{looks} times"
    shown = "`predict` takes the mean over a scan and its mirror image"
    shown += f", in windows of {settings['window']}³ voxels" if settings.get("window") else ""
    training = textwrap.fill(
        f"`benchmarks/public_model.py train {kind}`, seed {settings['seed']}: {steps:,} steps{plan}. Each takes "
        f"{settings['batch']} crops of {settings['crop']}³ voxels. AdamW, {settings['warmup']} steps of warm-up to a "
        f"rate of {settings['rate']:g}, then half a cosine to 0; gradients clipped to norm {settings['clip_norm']:g}; "
        "Dice and half the binary cross-entropy; flips of left and right, intensities scaled and shifted by up to a "
        f"tenth. The model is the moving average of the weights ({settings['average']:g} per step). Seen: {seen}. "
        f"Generator: {generators}. {state['seconds'] / 60:.0f} minutes on one core that others used too. "
        f"`{kind}.csv` beside this card is the curve of the training, with the Dice of 12 generated held-out patients.",
        width=120, break_on_hyphens=False)
    return f"""# Public model "{kind}"

A network that segments glioma in 3-D MRI, trained on **generated patients alone**: no scan of any person was used.
{_ABOUT[kind].strip()}

## Model details

| | |
| --- | --- |
| network | MONAI's SegResNet (Myronenko 2018), {settings['filters']} filters, 1.2 million parameters, float32 |
| input | FLAIR, T1, T1c, T2 at {settings['spacing_mm']:g} mm, z-scored over the brain, shape (4, X, Y, Z) |
| output | one probability per voxel for TC, WT and ET; {shown} |
| weights, SHA-256 | `{found['sha256']}` |
| license | Apache-2.0 |

## Training

{training}

## Scores

Mean Dice with 95 % intervals (bootstrap over patients); the generated ones are of `{found["generator of the scores"]}`.
Rule for regions that the reference lacks: "BraTS" counts 1 for an empty prediction and 0 for any other; "skip" leaves
the patient out of the region's mean.

| patients | rule | WT | TC | ET | mean |
| --- | --- | --- | --- | --- | --- |
{chr(10).join(rows)}

For comparison, the WT Dice of the best intensity threshold at {settings['spacing_mm']:g} mm, chosen with hindsight:
{thresholds}.

Candidates of this model were scored on the real patients {looked} in all. Nothing was chosen or tuned by these scores.
Five patients are too few to estimate anything: their interval says only how much they differ.

## Limits

Research, teaching and a start of training only: not a medical device, and not for any decision about a patient. Scores
on generated patients say little about real ones. Children, metastases, other lesions and other sequences were not
generated. Evaluate it on patients of the place where it is to be used, and inspect the segmentations.
"""


def _train(options: argparse.Namespace) -> None:
    given = {name: getattr(options, name) for name in ("steps", "rate", "batch", "crop", "passes")}
    recipe = replace(RECIPES[options.kind], **{name: value for name, value in given.items() if value is not None})
    train(options.kind, options.out, recipe=recipe, seed=options.seed, start=options.start,
          generators=options.generators)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("train", help="begin or continue a training")
    command.add_argument("kind", choices=RECIPES)
    command.add_argument("--out", type=Path, required=True, help="folder of the training")
    command.add_argument("--steps", type=int, help="optimiser steps (default: the recipe's)")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--start", help="folder of another training, or name of a public model, whose weights a new "
                         "one begins with")
    command.add_argument("--rate", type=float, help="learning rate after the warm-up (default: the recipe's)")
    command.add_argument("--batch", type=int, help="crops per step (default: the recipe's)")
    command.add_argument("--crop", type=int, help="voxels per axis of a crop (default: the recipe's)")
    command.add_argument("--passes", type=int, help="crops of each patient (default: the recipe's)")
    command.add_argument("--generators", type=int, default=0, help="processes for patients (default: 0, the trainer's)")
    command.set_defaults(run=_train)
    command = commands.add_parser("score", help="score a training on generated patients and, once, on real ones")
    command.add_argument("out", type=Path, help="folder of the training")
    command.add_argument("--real", type=Path, help="folder of labelled real scans")
    command.set_defaults(run=lambda options: print(json.dumps(score(options.out, seed=1, real=options.real), indent=1)))
    command = commands.add_parser("ship", help="put a scored model into the package")
    command.add_argument("out", type=Path, help="folder of the training")
    command.set_defaults(run=lambda options: ship(options.out))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.run(options)


if __name__ == "__main__":
    main()
