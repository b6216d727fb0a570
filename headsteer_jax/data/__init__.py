"""Images and labels: their sources, their splits, and the order in which training sees them."""
