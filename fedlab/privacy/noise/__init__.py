"""Samplers of noise, each once. Read `continuous` first. Imports what `fedlab.privacy` may."""
