"""Generated patients: anatomy, tumours and MR contrasts. Read `cohort` first. Imports what `fedlab.data` may."""
