"""Sliders for a privacy technique, with the update that leaves a site, an attack on it, and its privacy cost."""

from __future__ import annotations

import copy
import math
import textwrap
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fedlab.core.files import filled_in
from fedlab.core.seeds import derive, generator
from fedlab.core.settings import check_choice, check_positive, check_share, check_whole, check_within
from fedlab.core.types import MODALITIES, Patient, SiteState, Spent, Update, rounded_up
from fedlab.evidence.inversion import Inversion, invert_update, one_step_update, patch_net, tumour_patch
from fedlab.evidence.reconstruction import channel_correlations, tissue_prior
from fedlab.privacy.accounting.ledger import Gaussian, Ledger, epsilon_of
from fedlab.privacy.base import Privacy
from fedlab.privacy.dp.clipping import clip_update
from fedlab.privacy.dp.site_level import LocalGaussian
from fedlab.privacy.sparse.partial_sharing import PartialSharing
from fedlab.training.public_model import public_model
from fedlab.view.colours import BLUE, ORANGE, styled
from fedlab.view.slices import slice_image
from fedlab.view.widget_snapshot import display_snapshot, snapshot

if TYPE_CHECKING:
    from fedlab.view.picture import Picture

__all__ = ["Knobs", "PrivacyPlayground"]

#: The weights that the update starts from: of a small or given network, or of the public model.
Weights = Literal["random", "public"]

_WAIT = 0.5  # seconds without a change before an attack begins
#: Weight of the total variation in the attack. With ten times as much a tumour is not recognised without protection.
_SMOOTHNESS = 1e-3
#: Patients who are generated for what the adversary knows beforehand.
_PUBLIC = 4
#: Correlation within FLAIR and T1c from which on a person recognises the patch.
_RECOGNISED = 0.7
#: Weights -> what the menu says.
_WEIGHTS = {"random": "random weights, small network", "given": "the given network", "public": "the public model"}


@dataclass(frozen=True, kw_only=True)
class Knobs:
    """The settings of a `PrivacyPlayground`; a number out of range raises `ValueError`.

    Args:
        clip: clipping norm of the update, in the unit of the weights.
        noise_multiplier: σ, standard deviation of the noise divided by `clip`; 0 for no noise.
        fraction: share of the entries that is sent, the largest ones.
    """

    clip: float
    noise_multiplier: float = 0.0
    fraction: float = 1.0

    def __post_init__(self) -> None:
        check_positive(clip=self.clip)
        check_share(fraction=self.fraction)
        check_within(noise_multiplier=self.noise_multiplier)

    def privacy(self, *, delta: float) -> Privacy:
        """These settings as techniques for `federate`; clipping without noise is not a technique."""
        noise = LocalGaussian(clip=self.clip, noise_multiplier=self.noise_multiplier, delta=delta,
                              accountant="gdp") if self.noise_multiplier > 0 else None
        sharing = PartialSharing(fraction=self.fraction) if self.fraction < 1 else None
        return noise + sharing if noise and sharing else noise or sharing or Privacy()

    def protect(self, update: Update, *, delta: float, seed: int) -> Update:
        """The update as it would leave the site, with the privacy spent in one round."""
        state = SiteState()
        Ledger.open(state, site=update.site, round=0, stream=str(seed))
        clipped = clip_update(update, self.clip)
        sent = self.privacy(delta=delta).protect(clipped, state, generator(seed, "playground"))
        return replace(sent, spent=Ledger(state).spent())

    def spent(self, *, delta: float, rounds: int) -> Spent | None:
        """Privacy that so many rounds spend per site; None without noise, since then nothing is proven."""
        if self.noise_multiplier == 0:
            return None
        # Two updates of a site, each clipped, differ by at most twice the clipping norm.
        release = Gaussian(noise_multiplier=self.noise_multiplier / 2, steps=rounds)
        return Spent(epsilon=epsilon_of([release], delta=delta, accountant="gdp"), delta=delta, unit="site",
                     accountant="gdp", adjacency="any two updates of a site", repeats=True)


class PrivacyPlayground:
    """Sliders for clipping norm, σ, fraction and ε over one real update: the update sent, and what it reveals.

    The update is one plain gradient step of a network on one patch around a tumour. `LocalGaussian` and
    `PartialSharing` clip, perturb and thin it as in a run; the accountant states the cost of `rounds` such rounds; and
    a gradient inversion (`fedlab.evidence.inversion`) searches for the patch in the update sent, anew for every
    setting, in a thread. It is the easiest case for an adversary: one patch, one step, known labels. A failed
    reconstruction proves nothing; the accountant's ε does.

    A menu chooses the weights that the step starts from: a small network at random ones, which the attack inverts
    within seconds, or `fl.public_model("collection")`, a large trained network, which it seldom inverts within its
    time: there it begins at what the adversary expects (`tissue_prior`) and weighs all layers alike. Beside each score
    stands that of the expectation alone, without any update.

    Args:
        patient: with a label; by default a generated one, which takes a few seconds.
        model: maps images (B, 4, X, Y, Z) to logits (B, 3, X, Y, Z), in place of the small untrained `patch_net`.
        weights: "random", the small network or the given one, or "public", the public model.
        public: other patients with tumours, from whom the adversary knows the usual intensities; by default a few
            generated ones, made at the first attack. With none there is no expectation to compare with.
        crop: edge of the patch in voxels.
        rounds: the number of rounds to which ε refers.
        delta: of the guarantee.
        steps: of an attack, at most.
        max_seconds: of an attack, at most.
        seed: of the patient, the network, the noise and the attack.
        auto: whether every change starts an attack; else the button does.

    Raises:
        ValueError: a patient without a label or a tumour, or smaller than the patch; a number out of range.
    """

    def __init__(self, *, patient: Patient | None = None, model: nn.Module | None = None,
                 weights: Weights = "random", public: Sequence[Patient] | None = None, crop: int = 16, rounds: int = 10,
                 delta: float = 1e-2, steps: int = 400, max_seconds: float = 60.0, seed: int = 0, auto: bool = True
                 ) -> None:
        check_whole(rounds=rounds, steps=steps)
        check_whole(least=4, crop=crop)
        check_positive(delta=delta, max_seconds=max_seconds)
        check_within(below=1, delta=delta)
        check_choice(get_args(Weights), weights=weights)
        self.rounds, self.delta, self.steps, self.max_seconds, self.seed = rounds, delta, steps, max_seconds, seed
        if patient is None:
            from fedlab.data.phantom.generator import make_cohort

            patient = make_cohort(sizes=[1], held_out=0, shape=(48, 64, 48), seed=seed, workers=0,
                                  progress=False)[0].train[0]
        self.patient = patient
        self.patch, self.regions = tumour_patch(self.patient, crop)
        self._own = patch_net(seed=seed) if model is None else copy.deepcopy(model)
        self._public = public
        self._kept: dict[str, dict[Knobs, Inversion]] = {"random": {}, "public": {}}
        self._start_from(weights)
        self._progress: tuple[Knobs, int, torch.Tensor] | None = None  # of a running attack
        self._failed = ""
        self._running: threading.Thread | None = None
        self._cancelled = threading.Event()
        self._silent = False
        self._renew: Callable[[], None] = lambda: None  # renews the static copy in the cell that displays it
        self._build(auto, "random" if model is None else "given")
        self._changed()

    @property
    def knobs(self) -> Knobs:
        """The present settings."""
        return Knobs(clip=float(self._clip.value), fraction=float(self._fraction.value),
                     noise_multiplier=float(self._sigma.value) if self._noise.value else 0.0)

    def set(self, *, clip: float | None = None, noise_multiplier: float | None = None, fraction: float | None = None,
            epsilon: float | None = None, weights: Weights | None = None) -> PrivacyPlayground:
        """Moves the sliders; settings that are not given stay. `epsilon`, of all rounds, sets the noise multiplier.

        With other weights the update is another one, and a clipping norm that is not given keeps its ratio to it.

        Raises:
            ValueError: a number out of range, or both a noise multiplier and an ε.
        """
        if epsilon is not None and noise_multiplier is not None:
            raise ValueError("an ε and the noise multiplier determine each other: give one of them")
        if weights is not None:
            check_choice(get_args(Weights), weights=weights)
            with self._quiet():
                self._weights.value = weights
            self._take(weights)
        now = self.knobs
        wanted = Knobs(clip=now.clip if clip is None else clip, fraction=now.fraction if fraction is None else fraction,
                       noise_multiplier=now.noise_multiplier if noise_multiplier is None else noise_multiplier)
        sigma = wanted.noise_multiplier if epsilon is None else self._sigma_for(epsilon)
        with self._quiet():
            self._noise.value = sigma > 0
            for slider, value in ((self._clip, wanted.clip), (self._sigma, sigma)):
                if value > 0:  # a slider silently keeps its value within its range
                    slider.min, slider.max = min(slider.min, math.log10(value)), max(slider.max, math.log10(value))
                    slider.value = value
            self._fraction.min = min(self._fraction.min, wanted.fraction)
            self._fraction.value = wanted.fraction
        self._changed()
        return self

    def reconstruct(self) -> Inversion:
        """Attacks the update sent under the present settings, in this thread; the result is kept per setting."""
        self._cancel()
        knobs = self.knobs
        if knobs not in self._found:
            self._found[knobs] = self._attack(knobs, lambda taken, patch: True)
        self._show()
        return self._found[knobs]

    @property
    def widget(self) -> Any:
        """The ipywidgets box, for use in an app."""
        return self._box

    def html(self) -> str:
        """Update and reconstruction as they are now: self-contained HTML."""
        return ('<div style="font-family:sans-serif;background:var(--jp-layout-color1,#fff);'
                'color:var(--jp-ui-font-color1,#222)">'
                f"{self._facts_box.value}{self._picture_box.value}</div>")

    @styled
    def figure(self) -> Picture:
        """Middle axial slices of the patch, its reconstruction and their difference, one column per modality."""
        from fedlab.view.picture import Picture

        rows = self._pictures()
        figure = Picture(figsize=(7.2, 1.9 * len(rows) + 0.6), layout="constrained")
        for (name, row), axes in zip(rows.items(), figure.subplots(len(rows), 4, squeeze=False), strict=True):
            for ax, modality, picture in zip(axes, MODALITIES, row, strict=True):
                ax.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
                ax.set(xticks=[], yticks=[], title=modality)
            axes[0].set_ylabel(name)
        figure.suptitle(textwrap.fill(self._outcome(), 105), fontsize=9)
        figure.alt = self._outcome()
        return figure

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, Any]:
        return snapshot(self.widget, text=repr(self), html=self.html(), picture=self.figure)

    def _ipython_display_(self) -> None:
        self._renew = display_snapshot(self._repr_mimebundle_)

    def __repr__(self) -> str:
        return f"<PrivacyPlayground of patient {self.patient.id}: {self.knobs!r}; {self._outcome()}>"

    @cached_property
    def prior(self) -> torch.Tensor | None:
        """What the adversary expects of the labels alone, (4, X, Y, Z); None without other patients."""
        others = self._public
        if others is None:
            from fedlab.data.phantom.generator import make_cohort

            others = make_cohort(sizes=[_PUBLIC], held_out=0, shape=(48, 64, 48), seed=derive(self.seed, "public"),
                                 workers=0, progress=False)[0].train
        patches = [tumour_patch(one, self.patch.shape[1]) for one in others if one is not self.patient]
        return tissue_prior(patches, self.regions) if patches else None

    def _start_from(self, weights: Weights) -> None:
        """Takes a network and its update, and what has been found about it."""
        self.weights: Weights = weights
        self.model = self._own if weights == "random" else public_model("collection")
        self.update = one_step_update(self.model, self.patch, self.regions, site=self.patient.id)
        self._found = self._kept[weights]

    def _take(self, weights: Weights) -> None:
        """Starts from other weights; the clipping norm keeps its ratio to the norm of the update."""
        if weights == self.weights:
            return
        self._cancel()
        ratio = float(self._clip.value) / self.update.norm()
        self._start_from(weights)
        norm = self.update.norm()
        with self._quiet():
            self._clip.min, self._clip.max = -30.0, 30.0
            self._clip.value = _digits(ratio * norm)
            self._clip.min, self._clip.max = math.log10(norm) - 2, math.log10(norm) + 1

    def _build(self, auto: bool, own: str) -> None:
        import ipywidgets as widgets

        norm = self.update.norm()
        wide = {"style": {"description_width": "150px"}, "layout": widgets.Layout(width="440px")}
        self._clip, self._sigma, self._epsilon = (
            widgets.FloatLogSlider(value=value, min=low, max=high, step=0.05, readout_format=".3g", description=name,
                                   **wide)
            for name, value, low, high in (("clipping norm", float(rounded_up(norm)), math.log10(norm) - 2,
                                            math.log10(norm) + 1), ("noise multiplier σ", 1e-2, -5, 3),
                                           (f"ε of {self.rounds} rounds", 1e3, -2, 12)))
        self._fraction = widgets.FloatSlider(value=1.0, min=0.01, max=1.0, step=0.01, readout_format=".2f",
                                             description="fraction shared", **wide)
        self._noise = widgets.Checkbox(value=False, description="add noise", indent=False)
        self._auto = widgets.Checkbox(value=auto, description="reconstruct automatically", indent=False)
        self._button = widgets.Button(description="Reconstruct", icon="search", button_style="primary")
        self._weights = widgets.Dropdown(
            options=[(_WEIGHTS[own], "random"), (_WEIGHTS["public"], "public")], value=self.weights,
            description="start of the step", **wide)
        self._bar = widgets.IntProgress(min=0, max=self.steps, description="attack",
                                        layout=widgets.Layout(width="440px", visibility="hidden"))
        self._facts_box, self._picture_box = widgets.HTML(), widgets.HTML()
        for control in (self._weights, self._clip, self._sigma, self._epsilon, self._fraction, self._noise, self._auto):
            control.observe(partial(self._moved, control), names="value")
        self._button.on_click(lambda button: self._begin())
        knobs = widgets.VBox([self._weights, self._clip, self._noise, self._sigma, self._epsilon, self._fraction,
                              widgets.HBox([self._button, self._auto]), self._facts_box])
        self._box = widgets.HBox([knobs, widgets.VBox([self._bar, self._picture_box])],
                                 layout=widgets.Layout(flex_flow="row wrap"))

    def _moved(self, control: Any, change: object) -> None:
        """After the user has moved a control; σ and ε follow each other, and both add noise."""
        if self._silent:
            return
        if control is self._weights:
            self._take(self._weights.value)
        with self._quiet():
            if control is self._clip:
                self._clip.value = _digits(float(self._clip.value))
            if control is self._epsilon:
                self._sigma.value = self._sigma_for(float(self._epsilon.value))
            if control in (self._sigma, self._epsilon):
                self._noise.value = True
        self._changed()

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Within it the program moves the sliders, not the user."""
        self._silent = True
        try:
            yield
        finally:
            self._silent = False

    def _sigma_for(self, epsilon: float) -> float:
        """The smallest σ of the slider's range, in four digits, that keeps all rounds within ε."""
        check_positive(epsilon=epsilon)
        low, high = 1e-5, 1e3
        while high / low > 1.001:
            middle = math.sqrt(low * high)
            spent = replace(self.knobs, noise_multiplier=middle).spent(delta=self.delta, rounds=self.rounds)
            low, high = (middle, high) if spent is not None and spent.epsilon > epsilon else (low, middle)
        return float(rounded_up(high, 4))

    def _changed(self) -> None:
        """Updates everything after a setting has changed."""
        sent = self.knobs.protect(self.update, delta=self.delta, seed=self.seed)
        spent = self.knobs.spent(delta=self.delta, rounds=self.rounds)
        self._sigma.disabled = self._epsilon.disabled = spent is None
        if spent is not None:
            with self._quiet():
                self._epsilon.value = min(max(float(rounded_up(spent.epsilon)), 1e-2), 1e12)
        self._facts_box.value = self._facts(sent, spent)
        if self._auto.value and self.knobs not in self._found:
            self._begin()
        else:
            self._cancel()
            self._show()

    def _begin(self) -> None:
        """Starts an attack in a thread, in place of a running one."""
        self._cancelled.set()
        self._progress, self._failed = None, ""
        if self.knobs not in self._found:
            self._cancelled = threading.Event()
            self._running = threading.Thread(target=self._attack_later, args=(self.knobs, self._cancelled),
                                             name="fedlab attack", daemon=True)
            self._running.start()
        self._show()

    def _cancel(self) -> None:
        """Ends the attack of the thread."""
        self._cancelled.set()
        if self._running is not None:
            self._running.join()

    def _attack_later(self, knobs: Knobs, cancelled: threading.Event) -> None:
        """The thread: attacks once the sliders rest."""
        def on_step(taken: int, patch: torch.Tensor) -> bool:
            self._bar.value = taken
            if taken % 20 == 0 and not cancelled.is_set():
                self._progress = (knobs, taken, patch)
                self._show()
            return not cancelled.is_set()

        if cancelled.wait(_WAIT):
            return
        self._bar.value, self._bar.layout.visibility = 0, "visible"
        try:
            found = self._attack(knobs, on_step)
        except Exception as error:  # a thread has no cell to show it
            self._failed = f"{type(error).__name__}: {error}"
            self._show()
            return
        finally:
            self._bar.layout.visibility = "hidden"
        if not cancelled.is_set():
            self._found[knobs] = found
            self._show()
            self._renew()

    def _attack(self, knobs: Knobs, on_step: Callable[[int, torch.Tensor], bool]) -> Inversion:
        sent = knobs.protect(self.update, delta=self.delta, seed=self.seed)
        prior, large = self.prior, self.weights == "public"
        return invert_update(sent.delta, model=self.model, regions=self.regions, steps=self.steps, seed=self.seed,
                             smoothness=_SMOOTHNESS, max_seconds=self.max_seconds, on_step=on_step, per_layer=large,
                             start=prior if large else None, lr=0.02 if large else 0.1)

    def _facts(self, sent: Update, spent: Spent | None) -> str:
        """The update that leaves the site, and its privacy cost."""
        knobs = self.knobs
        before, after = (torch.cat([t.flatten().double() for t in one.delta.values()]) for one in (self.update, sent))
        edge = float(np.quantile(torch.cat([before, after]).abs().numpy(), 0.999)) or float(before.abs().max()) or 1.0
        return filled_in(
            "fedlab.view", "playground_facts.html", update=self.update, sent=sent, spent=spent, knobs=knobs,
            rounds=self.rounds, entries=before.numel(), share=float((after != 0).float().mean()),
            cosine=float(torch.cosine_similarity(before, after, dim=0)), edge=edge,
            code=repr(knobs.privacy(delta=self.delta)) if spent is not None or knobs.fraction < 1 else "",
            histograms=((_heights(after, edge), ORANGE, 0.45), (_heights(before, edge), BLUE, 0.35)))

    def _outcome(self) -> str:
        found, progress = self._found.get(self.knobs), self._progress
        if found is None:
            return (f"attack running: step {progress[1]} of {self.steps}"
                    if progress is not None and progress[0] == self.knobs else "no attack on these settings yet")
        expected = "" if self.prior is None else f"; expected without any update {_scores(self.prior, self.patch)}"
        return (f"correlation with the true patch {found.correlation(self.patch):.2f} over all channels, within them "
                f"{_scores(found.image, self.patch)} (1: the patch itself, 0: unrelated) after {found.steps} steps in "
                f"{found.seconds:.1f} s{expected}. {self._verdict(found)}")

    def _verdict(self, found: Inversion) -> str:
        """What the scores mean, in a sentence or two."""
        reached = channel_correlations(found.image, self.patch)
        known = 0.0 if self.prior is None else float(channel_correlations(self.prior, self.patch).mean())
        seen = min(float(reached[MODALITIES.index(name)]) for name in ("FLAIR", "T1c")) >= _RECOGNISED
        if seen and float(reached.mean()) > known:
            return "A person recognises the patch: this update is a picture of the patient."
        what = "A part of the patch" if float(reached.mean()) > max(known, 0.3) else "No more than was known before"
        weak = (" From trained weights of a large network this attack is weak; from random weights of a small one an "
                "update gives its patch away." if self.weights == "public" and not self.knobs.noise_multiplier else "")
        return f"{what} is seen with this attack in its time, which proves nothing: another may succeed.{weak}"

    def _volumes(self) -> dict[str, torch.Tensor]:
        """The patch, and the reconstruction under the present settings as far as it has come."""
        volumes = {"the patch": self.patch}
        if (found := self._found.get(self.knobs)) is not None:
            volumes["reconstruction"] = found.image
        elif self._progress is not None and self._progress[0] == self.knobs:
            volumes["reconstruction"] = self._progress[2]
        if "reconstruction" in volumes:
            volumes["difference"] = volumes["reconstruction"] - self.patch
        return volumes

    def _pictures(self) -> dict[str, list[npt.NDArray[np.float64]]]:
        """Middle slices between 0 and 1, in one grey window per modality; 0 of the difference is middle grey."""
        windows = [np.percentile(_slice(channel), (1, 99)) for channel in self.patch]
        pictures = {}
        for name, volume in self._volumes().items():
            middle = 0.5 if name == "difference" else 0.0
            pictures[name] = [np.clip(middle + (_slice(channel) - (0 if middle else low)) / max(high - low, 1e-9), 0, 1)
                              for channel, (low, high) in zip(volume, windows, strict=True)]
        return pictures

    def _show(self) -> None:
        from fedlab.view.picture import png_base64

        images = {name: [png_base64(picture) for picture in row] for name, row in self._pictures().items()}
        self._picture_box.value = filled_in("fedlab.view", "playground_images.html", outcome=self._outcome(),
                                            failed=self._failed, modalities=MODALITIES, rows=images)


def _slice(channel: torch.Tensor) -> npt.NDArray[np.float64]:
    """The middle axial slice."""
    return slice_image(channel.double().numpy(), "axial", channel.shape[2] // 2)


def _scores(image: torch.Tensor, truth: torch.Tensor) -> str:
    """The correlation within each modality."""
    within = channel_correlations(image, truth).tolist()
    return ", ".join(f"{name} {value:.2f}" for name, value in zip(MODALITIES, within, strict=True))


def _digits(value: float) -> float:
    """A number in three digits."""
    return float(f"{value:.3g}")


def _heights(values: torch.Tensor, edge: float) -> list[float]:
    """A histogram between two edges, on a logarithmic scale from 0 to 1; values beyond count at the edge."""
    counts, _ = np.histogram(values.clamp(-edge, edge).numpy(), bins=61, range=(-edge, edge))
    heights: list[float] = (np.log10(counts + 1) / math.log10(len(values) + 1)).tolist()
    return heights
