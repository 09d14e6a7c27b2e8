"""One instance at work: the step loop, the messages between it and its routers, and the gRPC
service to which routers attach.

May import: `kv`, `engine` and below. Begin with `worker.py`, the loop, and `messages.py`, all that
is said to a worker and by it; `moves.py` has the KV that goes out and comes in; `codec.py` has the
form of each message on the wire.
"""
