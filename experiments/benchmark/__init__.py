"""Measures what a step costs; a program, run by `python -m experiments.benchmark`."""
