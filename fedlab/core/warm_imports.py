"""Imported once by the server that workers are forked from, so that each worker starts warm. Import it nowhere else."""

# ruff: noqa: E402
import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during these imports ends the server without a traceback

import monai.inferers
import monai.losses
import monai.metrics
import monai.networks.nets
import monai.transforms  # noqa: F401

# The first step of any optimiser imports it, for seconds.
import torch._dynamo  # noqa: F401
