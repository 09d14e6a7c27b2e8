"""Numbers that stand for the pages of prompts, so that prompts that begin alike can share them."""

import hashlib
from array import array
from collections.abc import Sequence


def page_keys(page_size: int, secret: bytes, prompt: Sequence[int]) -> tuple[int, ...]:
    """One for each whole page of a prompt, the same for two where all tokens up to the page's end
    are the same.

    secret: random, at most 64 bytes, known to this process alone: so that nobody can make two
    prompts, of which one would be answered from the other's KV.
    """
    tokens = memoryview(array("i", prompt))
    so_far = hashlib.blake2b(key=secret, digest_size=16)
    keys = []
    for end in range(page_size, len(prompt) + 1, page_size):
        so_far.update(tokens[end - page_size : end])
        keys.append(int.from_bytes(so_far.digest()))
    return tuple(keys)
