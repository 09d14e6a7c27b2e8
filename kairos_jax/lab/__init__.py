"""Runs that are not serving: replays of a workload, sweeps, the paper's claims, advice on a layout.
`report/` has the tables and pages that come of them.

May import: all but the binaries. Begin with `cells.py`, what a sweep is made of.
"""
