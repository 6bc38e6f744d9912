"""Generated patients: anatomy, tumours and MR contrasts. Read `generator` first. Imports what `fedlab.data` may."""
