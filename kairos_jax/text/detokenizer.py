"""Text of a growing output, token by token."""

import itertools
from collections.abc import Iterable, Sequence

from kairos_jax.text.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"


class Detokenizer:
    """Text of a growing output. The deltas, joined, are what the output adds to the text of its
    prompt: `decode(prompt + output)` without `decode(prompt)`.

    Decoders look at neighbours: a character may be spread over tokens, and some decoders drop the
    space in front of the first token. So each push decodes a short window of tokens again, and the
    delta is what is new at its end. The window begins with the last tokens of the prompt. The cost
    of a push does not depend on how long the prompt and the output are.

    Args:
      prompt: token ids in front of the output; empty for a text that begins with it.
    """

    # U+FFFD at the end may become a character with the next token: it is held back. Up to three of
    # them can stand for one unfinished character, so a longer run is broken bytes...
    _UNFINISHED = 3
    # ... each of which covers three bytes at most: as context that many tokens (9) are enough.
    _CONTEXT = 12
    # Tokens of one character.
    _CHARACTER = 4
    _WINDOW = 32
    # From here on even a run of broken bytes is let go, all but its last.
    _LIMIT = 64

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]):
        self._tokenizer = tokenizer
        with_text = filter(tokenizer.has_text, reversed(prompt))
        tail = list(itertools.islice(with_text, self._CONTEXT + self._CHARACTER))
        self._window, text = self._cut(tail[::-1])
        # The prompt's text. The output may change its end, where that is half a character.
        self._before: str | None = text
        self._sent = len(text)  # Characters of the window's text.

    def push(self, ids: Iterable[int]) -> str:
        """Takes the next tokens; returns the text that is now certain."""
        return "".join(self._push(id) for id in ids if self._tokenizer.has_text(id))

    def _push(self, id: int) -> str:
        self._window.append(id)
        text = self._decoded()
        held = len(text) - len(text.rstrip(_REPLACEMENT))
        if len(self._window) > self._LIMIT:
            held = min(held, 1)
        end = len(text) - held
        delta = text[self._sent : end]
        if delta:
            self._before = None
        self._sent = max(self._sent, end)
        if len(self._window) > self._WINDOW and held <= self._UNFINISHED:
            unsent = len(text) - self._sent
            self._window, text = self._cut(self._window)
            self._before, self._sent = None, max(len(text) - unsent, 0)
        return delta

    def _decoded(self) -> str:
        """The window's text. Where nothing was sent, finds what of it is the prompt's."""
        text = self._tokenizer.decode(self._window)
        if self._before is not None:
            self._sent = _common(self._before, text)
        return text

    def _cut(self, ids: list[int]) -> tuple[list[int], str]:
        """The last of some tokens, as context for the next, and their text."""
        if len(ids) < self._CONTEXT + self._CHARACTER:
            return ids, self._tokenizer.decode(ids)
        # One cut of four lies between characters, unless the bytes are broken. Within one, some
        # decoders would take the whole run of bytes after the cut for broken.
        tails = [ids[-(self._CONTEXT + extra) :] for extra in range(self._CHARACTER)]
        texts = [self._tokenizer.decode(tail) for tail in tails]
        clean = [not text.startswith(_REPLACEMENT) for text in texts]
        best = clean.index(True) if any(clean) else 0
        return tails[best], texts[best]

    def flush(self) -> str:
        """Returns the text that was held back, at the end of the output."""
        delta = self._decoded()[self._sent :]
        self._window, self._before, self._sent = [], None, 0
        return delta


def _common(first: str, second: str) -> int:
    """The length of what two texts begin with."""
    differ = (at for at, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(differ, min(len(first), len(second)))
