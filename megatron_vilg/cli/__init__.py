"""The verbs of the command vilg, one file each."""
