"""What decides: which prompts a step computes, which sequences decode, which instance gets a
request.

May import: `ledger` and `cost`. Begin with `prefill.py` or `decode.py`; each has its policies in a
dict.
"""
