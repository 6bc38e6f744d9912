"""The ledger of privacy spent and its mechanisms. Read `ledger` first. Imports what `fedlab.privacy` may."""
