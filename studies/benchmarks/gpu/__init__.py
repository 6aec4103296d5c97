"""Checks and measurements on a GPU, in minutes: python -m studies.benchmarks.gpu."""
