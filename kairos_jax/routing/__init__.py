"""Requests in progress: which worker each goes to, its way from prefill to decode, and on to
another worker where one is lost.

May import: `worker` and below. Begin with `router.py`, what clients ask of a router; `dispatch.py`
takes a request from worker to worker; `links.py` attaches to workers in other processes.
"""
