"""Token grids -> visual sentences."""
