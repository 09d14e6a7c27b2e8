"""The HTTP side of a server: OpenAI's API, metrics, the live page, and what stands before them.

May import: what `api` may, and of `api` the gate, the backend and the validator. Begin with
`app.py`, the table of routes.
"""
