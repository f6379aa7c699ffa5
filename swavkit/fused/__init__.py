"""The loss fused with the computation of scores, block by block."""
