"""Imported once by the server that workers are forked from, so that each worker starts warm. Import it nowhere else."""

# ruff: noqa: E402
import signal
import sys

signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during these imports ends the server without a traceback

# MONAI imports MLflow, which takes a second or more, for a handler that no worker uses. A worker itself can import it.
sys.modules["mlflow"] = None  # type: ignore[assignment]

import monai.inferers
import monai.losses
import monai.metrics
import monai.networks.nets
import monai.transforms  # noqa: F401

# The first step of any optimiser imports it, for seconds.
import torch._dynamo  # noqa: F401

del sys.modules["mlflow"]
