"""Codes and loss where each rank holds a part of the prototypes."""
