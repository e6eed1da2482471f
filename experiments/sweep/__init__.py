"""Trains a grid of configurations; a program, run by `python -m experiments.sweep`."""
