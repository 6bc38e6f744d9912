"""Runs across hospitals on NVIDIA FLARE. Nothing here imports NVFLARE until it is used; see `fedlab.flare.needs`."""
