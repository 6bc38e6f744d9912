"""What is known about a data set and its terms of use. Read `card` first. Imports what `fedlab.data` may."""
