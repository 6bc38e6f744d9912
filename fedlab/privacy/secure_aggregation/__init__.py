"""Sums that hide their terms. Read `aggregation` first, then `protocol`. Imports what `fedlab.privacy` may."""
