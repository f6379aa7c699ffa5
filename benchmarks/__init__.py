"""Benchmarks of swavkit and the published algorithm, described in ``README.md``."""
