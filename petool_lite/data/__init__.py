"""PEToolBench data: typed entries, the files they come in, and the demo's generated ones."""

SETTINGS = ("rating", "preferred", "chronological")  # of PEToolBench
