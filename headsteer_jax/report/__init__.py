"""What people look at: figures, the report page, the page of latents, and results pages for the documentation."""
