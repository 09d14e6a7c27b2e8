"""How long outputs will be, learned from the requests that have finished."""

import bisect
import math

import numpy as np

# Ages, in tokens, between which an output's prospects are told apart; prompts are told apart by
# eighths of an octave of their lengths.
_AGES = np.unique(np.round(2.0 ** np.arange(0, 20.5, 0.5)))
_AGE_LIST = _AGES.tolist()
_PER_OCTAVE = 8
# Finished requests, of one kind, that count for about as much as all that came before them.
_MEMORY = 1000
# As many tokens as nobody is asked for less than, by the first guess.
_FEW = 16
# Requests for whose weight a wider guess stands in for what a narrower one has seen.
_DOUBT = 2.0

GUESSES = ("as_long_again", "all", "alike")


class Outputs:
    """Expected lengths of outputs that have reached some length already.

    Nobody says how long an output will be. There are three guesses: that it lasts as long again as
    it has lasted (which needs no data and has no scale); the mean of all recent outputs that
    outlasted it; and the mean of those among them whose prompts were about as long. Each finished
    output tells how far each guess was off at each of its ages, in octaves, and the guess that has
    been nearest of late is the one that counts. So what was learned is ignored while it does not
    help. learn=False leaves the first guess alone.
    """

    def __init__(self, learn: bool = True) -> None:
        self.learn = learn
        self.num_finished = 0
        self.error = dict.fromkeys(GUESSES, 0.0)
        self._all = _Lives()
        self._alike: dict[int, _Lives] = {}

    @property
    def guess(self) -> str:
        """The guess in use."""
        return min(self.error, key=self.error.__getitem__)

    def add(self, num_prompt: int, num_tokens: int) -> None:
        """Learns from an output that ended after `num_tokens`."""
        if not self.learn:
            return
        kind = self._alike.get(key := _kind(num_prompt))
        if kind is None:
            kind = self._alike[key] = _Lives()
        count = bisect.bisect_left(_AGE_LIST, num_tokens)
        self.num_finished += 1
        newest = max(1 / self.num_finished, 1 / _MEMORY)
        # At its first token, and when it was about a quarter and half as long.
        for age in {0, max(count - 5, 0), max(count - 3, 0)} if count else ():
            unlearned = 2 * _AGE_LIST[age]
            wider = self._all.mean_at(age, unlearned)
            guesses = unlearned, wider, kind.mean_at(age, wider)
            for name, guess in zip(GUESSES, guesses, strict=True):
                error = abs(math.log2(guess / num_tokens))
                self.error[name] += newest * (error - self.error[name])
        self._all.add(count, num_tokens)
        kind.add(count, num_tokens)

    def expect(self, num_prompt: int, num_tokens: int) -> float:
        """Expected length, in tokens, of an output that has `num_tokens`: a quarter more at least,
        since its end is not known better than that.
        """
        guess = self.guess
        if guess == "as_long_again":
            return 2.0 * max(num_tokens, _FEW)
        age = max(bisect.bisect_right(_AGE_LIST, num_tokens), 1) - 1
        mean = self._all.mean_at(age, 2 * _AGE_LIST[age])
        lives = self._alike.get(_kind(num_prompt)) if guess == "alike" else None
        if lives is not None:
            mean = lives.mean_at(age, mean)
        return max(mean, 1.25 * num_tokens, num_tokens + 1.0)


class _Lives:
    """How many outputs lasted longer than each age, and their lengths in sum; the old ones fade."""

    def __init__(self) -> None:
        self._both = np.zeros((2, _AGES.size))
        self._longer, self._sum = self._both

    def mean_at(self, age: int, wider: float) -> float:
        """Mean length of those that outlasted one age."""
        return (self._sum.item(age) + _DOUBT * wider) / (self._longer.item(age) + _DOUBT)

    def add(self, count: int, num_tokens: int) -> None:
        """An output that outlasted the first `count` ages."""
        both = self._both
        np.multiply(both, 1 - 1 / _MEMORY, out=both)
        longer, lengths = self._longer[:count], self._sum[:count]
        longer += 1
        lengths += num_tokens


def _kind(num_prompt: int) -> int:
    return round(_PER_OCTAVE * math.log2(max(num_prompt, 1)))
