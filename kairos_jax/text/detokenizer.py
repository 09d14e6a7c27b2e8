"""Text of a growing output, token by token."""

from collections.abc import Iterable

from kairos_jax.text.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"


class Detokenizer:
    """Text of a growing output. The deltas, joined, are `tokenizer.decode` of all ids.

    Decoders look at neighbours: a character may be spread over tokens, and some drop the space in
    front of the first token. So a short window of tokens is decoded again at each push, and what is
    new at its end is sent. The cost of a push does not depend on what came before.
    """

    # U+FFFD at the end may become a character with the next token: it is held back. Up to three of
    # them can stand for one unfinished character, so a longer run is broken bytes...
    _UNFINISHED = 3
    # ... each of which covers three bytes at most: as context that many tokens (9) are enough.
    _CONTEXT = 12
    _WINDOW = 32
    # From here on even a run of broken bytes is let go, all but its last.
    _LIMIT = 64

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._sent = 0  # Characters of the window's text.

    def push(self, ids: Iterable[int]) -> str:
        """Takes the next tokens; returns the text that is now certain."""
        return "".join(self._push(id) for id in ids if self._tokenizer.has_text(id))

    def _push(self, id: int) -> str:
        self._window.append(id)
        text = self._tokenizer.decode(self._window)
        held = len(text) - len(text.rstrip(_REPLACEMENT))
        if len(self._window) > self._LIMIT:
            held = min(held, 1)
        end = len(text) - held
        delta = text[self._sent : end]
        self._sent = max(self._sent, end)
        if len(self._window) > self._WINDOW and held <= self._UNFINISHED:
            self._shorten(unsent=len(text) - self._sent)
        return delta

    def _shorten(self, unsent: int) -> None:
        # One cut of four lies between characters, unless the bytes are broken. Within one, some
        # decoders would take the whole run of bytes after the cut for broken.
        tails = [self._window[-(self._CONTEXT + extra) :] for extra in range(4)]
        texts = [self._tokenizer.decode(tail) for tail in tails]
        clean = [not text.startswith(_REPLACEMENT) for text in texts]
        best = clean.index(True) if any(clean) else 0
        self._window, self._sent = tails[best], max(len(texts[best]) - unsent, 0)

    def flush(self) -> str:
        """Returns what was held back, at the end of the output."""
        delta = self._tokenizer.decode(self._window)[self._sent :]
        self._window, self._sent = [], 0
        return delta
