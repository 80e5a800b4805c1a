"""Runs a recipe on other people's machines: Cloud TPU slices, GKE, Slurm.  Settings in one file, every command in a dry run."""
