"""How a process starts and ends: flags, the config file, errors and exit codes, signals, progress,
and where a model's files are.

May import: `kairos_jax.config`. Begin with `command.py`, which every binary runs through.
"""
