"""A fleet on a virtual clock, the workloads that it serves, and how a run is judged.

May import: `policies`, `ledger`, `cost`. Begin with `scenario.py`, what a simulated run consists
of.
"""
