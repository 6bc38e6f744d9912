"""Patients over sites: partitions, statistics, duplicates. Read `partition` first. Imports what `fedlab.data` may."""
