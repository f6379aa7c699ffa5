"""The loss block by block, fused with the product that gives the scores."""
