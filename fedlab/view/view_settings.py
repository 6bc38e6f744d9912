"""The choices of a viewer: modality, plane, layer, overlay, opacity, labels and crosshair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from fedlab.core.setting_checks import check_choice
from fedlab.core.types import MODALITIES
from fedlab.view.colours import ERRORS, LABEL_COLOURS, LABEL_NAMES, REGION_NAMES
from fedlab.view.label_layers import Case

__all__ = ["OVERLAYS", "VIEWS", "View", "ViewSettings"]

View: TypeAlias = Literal["all", "axial", "coronal", "sagittal", "3-D"]
#: Three planes and the 3-D view together, or one of them.
VIEWS: tuple[str, ...] = get_args(View)
#: What is drawn over the scan: labels, the errors of a region, or nothing.
OVERLAYS = ("labels", *(f"errors {region}" for region in REGION_NAMES), "none")


@dataclass(frozen=True, kw_only=True)
class ViewSettings:
    """What is shown of a case; as the arguments of `fedlab.show`, except:

    Attributes:
        layer: name of the layer over the scan: "reference" or an arm; None where there is none.
        crosshair: voxel of the case's box where the planes meet.

    Raises:
        ValueError: an unknown choice, or an opacity out of range.
    """

    modality: str = MODALITIES[0]
    view: str = "all"
    layer: str | None = None
    overlay: str = "labels"
    opacity: float = 0.6
    labels: tuple[int, ...] = (1, 2, 4)
    crosshair: tuple[int, int, int] = (0, 0, 0)

    def __post_init__(self) -> None:
        check_choice(MODALITIES, modality=self.modality)
        check_choice(VIEWS, view=self.view)
        check_choice(OVERLAYS, overlay=self.overlay)
        if not 0 <= self.opacity <= 1:
            raise ValueError(f"opacity goes from 0 to 1, got {self.opacity}")
        if unknown := set(self.labels) - set(LABEL_COLOURS):
            raise ValueError(f"labels are some of {', '.join(map(str, LABEL_COLOURS))}, got {sorted(unknown)}")

    @property
    def region(self) -> str | None:
        """Region of the error map, None where labels are shown."""
        return self.overlay.split()[1] if self.overlay.startswith("errors") else None

    def values(self, case: Case, layer: str | None) -> npt.NDArray[np.uint8] | None:
        """Values of the overlay in the box: labels, or an error map; None for no overlay."""
        if layer is None or self.overlay == "none":
            return None
        return case.layer(layer) if self.region is None else case.errors(layer, self.region)

    def colours(self) -> dict[int, tuple[str, float]]:
        """Value of the overlay -> its colour and opacity, without the labels that are not drawn."""
        if self.region is None:
            return {value: (LABEL_COLOURS[value], self.opacity) for value in LABEL_COLOURS if value in self.labels}
        return {value: (colour, self.opacity * (0.35 if value == 3 else 1.0))
                for value, (colour, _) in ERRORS.items()}

    def legend(self) -> dict[str, str]:
        """Colour -> its meaning."""
        if self.overlay == "none":
            return {}
        if self.region is None:
            return {LABEL_COLOURS[value]: LABEL_NAMES[value] for value in LABEL_COLOURS if value in self.labels}
        return {colour: f"{name} {self.region}" for colour, name in ERRORS.values()}
