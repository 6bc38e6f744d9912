"""Runs on NVIDIA FLARE. Read `nvflare` first, then `environments`. Imports what `fedlab.engines` may."""
