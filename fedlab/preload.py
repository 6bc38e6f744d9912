"""Imported once by the server that workers are forked from, so that each worker starts warm."""

import monai.inferers
import monai.losses
import monai.metrics
import monai.networks.nets
import monai.transforms  # noqa: F401
