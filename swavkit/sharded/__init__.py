"""Codes and loss if each rank holds a part of the prototypes."""
