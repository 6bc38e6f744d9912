"""Updates of which only a part is sent. Read `partial_sharing` first. Imports what `fedlab.privacy` may."""
