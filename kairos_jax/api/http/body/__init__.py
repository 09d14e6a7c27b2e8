"""What the body of a request says: its fields, those that are not served, and from them the
requests that it asks for.

May import: of `api`, the validator and the refusals. Begin with `request.py`, then `known.py`, the
table of fields.
"""
