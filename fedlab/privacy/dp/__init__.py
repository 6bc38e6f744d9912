"""Differential privacy: DP-SGD and noise per site. Read `dpsgd` first. Imports what `fedlab.privacy` may."""
