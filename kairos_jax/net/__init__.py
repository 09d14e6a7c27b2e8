"""What protects and watches a connection: TLS and tokens, addresses, heartbeats, health.

May import: `process`. Begin with `credentials.py`: a `Credentials` makes every channel and opens
every port between processes.
"""
