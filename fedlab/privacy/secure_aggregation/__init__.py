"""Sums that hide their terms. Read `secure_sum` first, then `protocol`. Imports what `fedlab.privacy` may."""
