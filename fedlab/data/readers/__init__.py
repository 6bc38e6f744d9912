"""Patients from folders: layouts, scans, tables and findings. Read `brats` first. Imports what `fedlab.data` may."""
