"""What one instance holds: its requests, the pages of its KV pool, the verbs that change them, and
a journal of those verbs.

May import: numpy. Begin with `instance.py`: `Instance` is the ledger, `Batch` a decision, `Policy`
what decides.
"""
