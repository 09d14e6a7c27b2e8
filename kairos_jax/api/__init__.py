"""What clients speak to: the server, the gRPC service, the checks of a request, and the gate that
says whether requests are taken. `http/` is the HTTP side.

May import: `observe`, `routing` and below. Begin with `server.py`, then `servicer.py`, the gRPC
service, or `http/app.py`, the HTTP API.
"""
