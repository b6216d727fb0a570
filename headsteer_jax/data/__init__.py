"""Images and labels: where they come from, how they are cut into splits, in which order training sees them."""
