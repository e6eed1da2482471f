"""Measures of a learned loss, figures and the report of a run."""
