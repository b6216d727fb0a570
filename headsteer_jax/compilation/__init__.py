"""Compiling a run's programs for machines that are not there."""
