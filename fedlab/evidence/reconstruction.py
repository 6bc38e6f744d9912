"""Reconstruction in 3-D, with scores that mean something: what the update adds to what the adversary knows anyway.

A correlation over all channels together is made by the channels' means: 0.7 for a picture in which nothing can be
recognised. So each score stands beside that of the adversary's prior alone, which knows the labels and the usual
intensity of each tissue, and the last one asks for what counts: which patient is it?
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from fedlab.core.settings import check_choice, check_positive, check_whole, check_within
from fedlab.core.types import Tensors
from fedlab.evidence.findings import Finding, Threat
from fedlab.evidence.intervals import mean_interval, share_interval
from fedlab.evidence.inversion import invert_update

__all__ = ["Reconstructed", "Reconstruction", "channel_correlations", "similarity", "tissue_prior"]

Patch = tuple[torch.Tensor, torch.Tensor]  # image (4, X, Y, Z) and regions (3, X, Y, Z)


@dataclass(frozen=True, kw_only=True, eq=False)
class Reconstructed:
    """Reconstructions and their scores, each beside that of the prior alone.

    Attributes:
        identified: share of patients who are found among the candidates by their reconstruction, at the first guess.
        correlation: mean over patients and channels of the correlation within a channel.
        similarity: mean of the structural similarity.
        images, truths, priors: patches (4, X, Y, Z), one per patient.
        ranks: the place of the true patient among the candidates, from 1.
    """

    identified: Finding
    correlation: Finding
    similarity: Finding
    images: Sequence[torch.Tensor]
    truths: Sequence[torch.Tensor]
    priors: Sequence[torch.Tensor]
    ranks: Sequence[int]

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Identification first: it is what counts."""
        return self.identified, self.correlation, self.similarity

    def __str__(self) -> str:
        return "\n".join(map(str, self.findings))

    def _repr_html_(self) -> str:
        return "".join(finding._repr_html_() for finding in self.findings)


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """The server looks for the patch that explains an update; see `invert_update` for the settings.

    Raises:
        ValueError: a setting is out of range.
    """

    objective: Literal["cosine", "euclidean"] = "cosine"
    per_layer: bool = True
    smoothness: float = 1e-3
    steps: int = 400
    lr: float = 0.1
    local_steps: int = 1
    local_lr: float = 0.1
    max_seconds: float = 120.0
    seed: int = 0
    threat: ClassVar[Threat] = Threat(
        who="server", sees="the update of plain steps on one patch, the model before it, the labels of the patch and "
        "patients of a public collection", wants="the scan")

    def __post_init__(self) -> None:
        check_choice(("cosine", "euclidean"), objective=self.objective)
        check_within(smoothness=self.smoothness)
        check_whole(steps=self.steps, local_steps=self.local_steps)
        check_positive(lr=self.lr, local_lr=self.local_lr, max_seconds=self.max_seconds)

    def __call__(self, model: nn.Module, deltas: Sequence[Tensors], patches: Sequence[Patch], *,
                 public: Sequence[Patch], candidates: Sequence[torch.Tensor] = ()) -> Reconstructed:
        """Attacks updates of several patients.

        Args:
            model: with the weights that every update starts from; does not change.
            deltas: the updates as they are sent, such as `one_step_update` gives, one per patch.
            patches: that they were computed from; the adversary is shown the regions only.
            public: patches of other patients, from which the prior is made; generated ones are free.
            candidates: images of patches among which each patient is sought, beside the patient's own; by default
                those of `public`.

        Raises:
            ValueError: no update, another number of patches, or no public patch.
        """
        if not len(deltas) or len(deltas) != len(patches) or not len(public):
            raise ValueError(f"expected one or more updates, as many patches and one or more public ones, got "
                             f"{len(deltas)}, {len(patches)} and {len(public)}")
        truths, regions = [image for image, _ in patches], [regions for _, regions in patches]
        priors = [tissue_prior(public, one) for one in regions]
        images = [invert_update(delta, model=model, regions=one, start=prior, objective=self.objective,
                                per_layer=self.per_layer, smoothness=self.smoothness, steps=self.steps, lr=self.lr,
                                local_steps=self.local_steps, local_lr=self.local_lr, seed=self.seed,
                                max_seconds=self.max_seconds).image
                  for delta, one, prior in zip(deltas, regions, priors, strict=True)]
        others = list(candidates) or [image for image, _ in public]
        ranks, of_prior = ([_rank(one, truth, others) for one, truth in zip(found, truths, strict=True)]
                           for found in (images, priors))
        about: dict[str, Any] = {"attack": repr(self), "threat": self.threat, "trials": len(deltas)}
        value, low, high = share_interval(sum(rank == 1 for rank in ranks), len(ranks))
        guess = max(1 / (1 + len(others)), sum(rank == 1 for rank in of_prior) / len(of_prior))
        identified = Finding(**about, measure=f"patients identified among {1 + len(others)}", value=value, low=low,
                             high=high, chance=guess)

        def scored(measure: str, score: Any) -> Finding:
            mean, low, high = mean_interval([score(a, b) for a, b in zip(images, truths, strict=True)])
            prior, _, _ = mean_interval([score(a, b) for a, b in zip(priors, truths, strict=True)])
            return Finding(**about, measure=measure, value=mean, low=max(-1.0, low), high=min(1.0, high), chance=prior)

        return Reconstructed(
            identified=identified, images=images, truths=truths, priors=priors, ranks=ranks,
            correlation=scored("correlation within channels", lambda a, b: float(channel_correlations(a, b).mean())),
            similarity=scored("structural similarity", similarity))


def tissue_prior(public: Sequence[Patch], regions: torch.Tensor) -> torch.Tensor:
    """The image that is expected of regions alone: each tissue's mean over public patches, (4, X, Y, Z).

    A tissue is a combination of regions; one that no public patch has takes the mean over all voxels.
    """
    known = torch.cat([_tissue(one).flatten() for _, one in public])
    values = torch.cat([image.float().flatten(1) for image, _ in public], dim=1)
    tissue = _tissue(regions)
    expected = torch.empty(len(values), *tissue.shape)
    for kind in tissue.unique():
        of_kind = values[:, known == kind] if bool((known == kind).any()) else values
        expected[:, tissue == kind] = of_kind.mean(dim=1, keepdim=True)
    return expected


def channel_correlations(image: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Pearson correlation within each channel, (channels,); 0 where one of the two has no contrast."""
    one, other = (t.double().flatten(1) - t.double().flatten(1).mean(dim=1, keepdim=True) for t in (image, truth))
    lengths = one.norm(dim=1) * other.norm(dim=1)
    return torch.where(lengths > 0, (one * other).sum(dim=1) / lengths.clamp(min=1e-30), 0.0)


def similarity(image: torch.Tensor, truth: torch.Tensor, *, window: int = 5) -> float:
    """Structural similarity, mean over channels and cubes of `window` voxels (Wang et al. 2004), float64.

    Each channel of the image is given the truth's mean and deviation first, so that only structure counts.
    """
    one, other = (t.double()[:, None] for t in (image, truth))
    axes = (1, 2, 3, 4)
    scale = other.std(dim=axes, keepdim=True) / one.std(dim=axes, keepdim=True).clamp(min=1e-12)
    one = (one - one.mean(dim=axes, keepdim=True)) * scale + other.mean(dim=axes, keepdim=True)
    span = other.amax(dim=axes, keepdim=True) - other.amin(dim=axes, keepdim=True)

    def mean(t: torch.Tensor) -> torch.Tensor:
        return nn.functional.avg_pool3d(t, window, stride=1)

    a, b = mean(one), mean(other)
    variance_a, variance_b, together = mean(one * one) - a * a, mean(other * other) - b * b, mean(one * other) - a * b
    small, large = (0.01 * span) ** 2 + 1e-12, (0.03 * span) ** 2 + 1e-12
    found = (2 * a * b + small) * (2 * together + large) / ((a * a + b * b + small) * (variance_a + variance_b + large))
    return float(found.mean())


def _tissue(regions: torch.Tensor) -> torch.Tensor:
    """The combination of regions of each voxel, as a number."""
    return torch.stack([(one > 0.5).long() << k for k, one in enumerate(regions)]).sum(dim=0)


def _rank(image: torch.Tensor, truth: torch.Tensor, others: Sequence[torch.Tensor]) -> int:
    """The place of the true patch among the candidates that are most like an image, from 1; ties count against it."""
    own = float(channel_correlations(image, truth).mean())
    return 1 + sum(float(channel_correlations(image, other).mean()) >= own for other in others)
