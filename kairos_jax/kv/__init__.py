"""How KV moves from the instance that has it to the one that goes on with it: offers, leases,
manifests, claims, and the ways in which the bytes travel.

May import: `engine` and below. Begin with `transport.py`: the protocol that a worker sees, and its
form within one process; `remote.py` is the form between processes.
"""
