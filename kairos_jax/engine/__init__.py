"""The compiled model of one instance: steps over shape buckets, the pool of KV pages, the programs
that are kept between starts, the profile of step times, and the followers of a mesh that spans
processes.

May import: `net`, `text`, `process`. Begin with `engine.py`, the one place where a ledger's work
becomes arrays; `build.py` makes the engines that a config describes.
"""
