"""A workdir and the trainer in it: loop, survival, metrics, goodput, profile, report."""
