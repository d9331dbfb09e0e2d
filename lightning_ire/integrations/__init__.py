"""The step of SAM and IRE in the loops of other packages: each is imported by its own module, and by nothing else."""
