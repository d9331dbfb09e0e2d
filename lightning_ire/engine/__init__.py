"""The step of IRE and SAM in plain torch: no Lightning, one idea of the papers per file."""
