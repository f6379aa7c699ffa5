"""Figures of a training over a window of steps, their plot, and their diagnosis."""
