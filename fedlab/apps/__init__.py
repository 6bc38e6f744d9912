"""Applications on top of fedlab: the command line and the comparison behind `fedlab demo` and `fedlab run`.

Read `cli` first, then `comparison`. Highest layer: it may import every package, and no package imports it.
"""
