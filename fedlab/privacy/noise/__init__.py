"""Samplers of noise, each once. Read `gaussian` first. Imports what `fedlab.privacy` may."""
