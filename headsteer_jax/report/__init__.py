"""Figures, the report page, the page of latents, and results pages for the documentation."""
