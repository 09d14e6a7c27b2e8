"""Sampling on the device. One packed array comes back, so that a step costs one copy to the host.

Dimension letters: R rows, one for each sequence, T tokens, D hidden size, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

MAX_TOP_LOGPROBS = 20
_PACKED = 2 + 2 * MAX_TOP_LOGPROBS
# Tokens of a prompt that are scored at a time.
_SCORED = 64
# In place of a token where a row's numbers are not finite: there is nothing to sample from.
INVALID = -1


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request samples. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off.

    seed: 64 unsigned bits. logprobs: None for none, else how many alternatives to report of each
    token that is sampled; prompt_logprobs: of each token of the prompt.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None


class SamplingInput(NamedTuple):
    """How each row samples.

    A row's random numbers depend on its seed and on the position of the sampled token alone: not
    on the batch around it, nor on which server runs the step.
    """

    temperature: Float[Array | np.ndarray, "R"]  # 0: greedy
    top_k: Int[Array | np.ndarray, "R"]  # 0: off
    top_p: Float[Array | np.ndarray, "R"]  # 1: off
    min_p: Float[Array | np.ndarray, "R"]  # 0: off
    seed: UInt[Array | np.ndarray, "R 2"]  # its lower 32 bits, and its upper ones
    position: Int[Array | np.ndarray, "R"]
    logprobs: Int[Array | np.ndarray, "R"]  # 1: wanted


class Sampled(NamedTuple):
    """What was sampled: log-probabilities are those of the model, before temperature and filters,
    and zeros where no row of the batch asked for them.
    """

    token: Int[Array, "R"]
    logprob: Float[Array, "R"]
    top_tokens: Int[Array, "R 20"]
    top_logprobs: Float[Array, "R 20"]


def sample(
    logits: Float[Array, "R V"], how: SamplingInput, finite: Bool[Array, "R"]
) -> Int[Array, "R 42"]:
    """Samples a token a row from f32 logits. The result is packed: see `unpack`.

    finite: whether the numbers that led to a row's logits were. Where they were not, or where the
    logits have a NaN or no finite maximum, the row's token is `INVALID`.
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # A NaN counts as the largest, so this one logit tells of all of the row.
    largest = jnp.take_along_axis(logits, greedy[:, None], axis=1)
    finite &= jnp.isfinite(largest[:, 0])
    token = jax.lax.cond(
        jnp.any(how.temperature > 0),
        lambda: jnp.where(how.temperature > 0, _draw(logits, largest, how), greedy),
        lambda: greedy,
    )
    token = jnp.where(finite, token, INVALID)
    return jax.lax.cond(
        jnp.any(how.logprobs),
        lambda: _with_logprobs(logits, token),
        lambda: jnp.pad(token[:, None], ((0, 0), (0, _PACKED - 1))),
    )


def score(
    head: Callable[[Float[Array, "B D"]], Float[Array, "B V"]],
    hidden: Float[Array, "T D"],
    targets: Int[Array | np.ndarray, "T"],
) -> Int[Array, "T 42"]:
    """Log-probabilities of given tokens, packed as `sample` packs those that it draws.

    head: f32 logits after each token. A block of tokens at a time, so that the logits of no more
    than those are there at once. Blocks that have no target of 0 or more give zeros.
    """
    block = math.gcd(targets.shape[0], _SCORED)

    def some(of):
        hidden, tokens = of
        return jax.lax.cond(
            jnp.any(tokens >= 0),
            lambda: _with_logprobs(head(hidden), tokens),
            lambda: jnp.zeros((block, _PACKED), jnp.int32),
        )

    with jax.named_scope("score"):
        blocks = hidden.reshape(-1, block, hidden.shape[1]), jnp.asarray(targets).reshape(-1, block)
        return jax.lax.map(some, blocks).reshape(-1, _PACKED)


def unpack(packed) -> Sampled:
    """Takes apart what `sample` gave, once it is a NumPy array on the host."""
    top = 2 + MAX_TOP_LOGPROBS
    return Sampled(
        token=packed[:, 0],
        logprob=packed[:, 1].view("float32"),
        top_tokens=packed[:, 2:top],
        top_logprobs=packed[:, top:].view("float32"),
    )


def _with_logprobs(logits: Float[Array, "R V"], token: Int[Array, "R"]) -> Int[Array, "R 42"]:
    top = min(MAX_TOP_LOGPROBS, logits.shape[1])
    pad = ((0, 0), (0, MAX_TOP_LOGPROBS - top))
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(logprobs, jnp.maximum(token, 0)[:, None], axis=1)
    best, ids = jax.lax.top_k(logprobs, top)
    bits = [token[:, None], _bits(chosen), jnp.pad(ids, pad), _bits(jnp.pad(best, pad))]
    return jnp.concatenate(bits, axis=1)


def _bits(values: Float[Array, "..."]) -> Int[Array, "..."]:
    return jax.lax.bitcast_convert_type(values, jnp.int32)


def _draw(
    logits: Float[Array, "R V"], largest: Float[Array, "R 1"], how: SamplingInput
) -> Int[Array, "R"]:
    """One token a row by the Gumbel-max trick, after temperature and filters."""
    # The largest is 0, so that no temperature makes it infinite.
    scaled = (logits - largest) / jnp.maximum(how.temperature, 1e-6)[:, None]
    noisy = scaled - jnp.log(-jnp.log(_uniform(how, logits.shape[1])))
    filtered = (how.top_k > 0) | (how.top_p < 1) | (how.min_p > 0)
    # Behind the noise, since no compiler joins a condition with the loop after it: noise and argmax
    # in one loop take XLA five times as long on a CPU, and longer to compile for a TPU.
    noisy = jax.lax.cond(
        jnp.any(filtered & (how.temperature > 0)),
        lambda: jnp.where(
            jax.lax.platform_dependent(scaled, how, cpu=_kept_by_rows, default=_kept),
            noisy,
            -jnp.inf,
        ),
        lambda: noisy,
    )
    return jnp.argmax(noisy, axis=-1).astype(jnp.int32)


def _uniform(how: SamplingInput, count: int) -> Float[Array, "R V"]:
    """Random numbers above 0 and below 1: what jax.random.uniform gives for the key of 64 bits of a
    row's seed, with its position folded in. JAX's own rounds of Threefry each go through memory on
    a CPU, and take ten times as long.
    """
    upper, lower = how.seed[:, 1], how.seed[:, 0]
    zero = jnp.zeros_like(lower)
    key = _threefry(upper, lower, zero, how.position.astype(jnp.uint32))
    counts = jnp.arange(count, dtype=jnp.uint32)[None]
    first, second = _threefry(key[0][:, None], key[1][:, None], jnp.zeros_like(counts), counts)
    mantissa = (first ^ second) >> 9
    one = jnp.uint32(0x3F800000)  # of 1.0, whose mantissa is 0
    below_one = jax.lax.bitcast_convert_type(mantissa | one, jnp.float32) - 1
    return jnp.maximum(below_one, jnp.finfo(jnp.float32).tiny)


def _threefry(key0, key1, x0, x1):
    """Threefry-2x32 of 20 rounds, as in Salmon et al., "Parallel random numbers: as easy as 1, 2,
    3" (2011): two words of 32 bits for each two that are counted.
    """
    keys = key0, key1, key0 ^ key1 ^ jnp.uint32(0x1BD11BDA)
    x0, x1 = x0 + key0, x1 + key1
    for group in range(5):
        for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            x0 = x0 + x1
            x1 = x0 ^ ((x1 << turn) | (x1 >> (32 - turn)))
        x0, x1 = x0 + keys[(group + 1) % 3], x1 + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return x0, x1


def _kept(scaled: Float[Array, "R V"], how: SamplingInput) -> Bool[Array, "R V"]:
    """What top-k, then top-p, and min-p leave. Ties at a border stay in, and so does the likeliest
    token, however little is to be kept. The largest of `scaled` is 0.

    Sort-free: the smallest kept logit is found bit by bit in an order-preserving integer form of
    the logits, 32 passes of compare and sum over the vocabulary for each filter that a row has.
    """
    keys = _ordered(scaled)
    vocab = scaled.shape[1]
    k = jnp.where(how.top_k > 0, jnp.minimum(how.top_k, vocab), vocab)
    floor = _largest(lambda t: jnp.sum(keys >= t[:, None], axis=1) >= k, k < vocab)
    weights = jnp.where(keys >= floor[:, None], jnp.exp(scaled), 0.0)
    # A hair below the target: the sum of all the weights may round to less than itself.
    target = jnp.where(how.top_p < 1, how.top_p, 0.0) * weights.sum(axis=1) * (1 - 1e-6)

    def holds_top_p(t):
        return jnp.sum(jnp.where(keys >= t[:, None], weights, 0.0), axis=1) >= target

    nucleus = _largest(holds_top_p, how.top_p < 1)
    # A target below the least float is 0, and any threshold reaches it.
    threshold = jnp.minimum(jnp.maximum(floor, nucleus), keys.max(axis=1))
    return (keys >= threshold[:, None]) & (weights >= how.min_p[:, None])


def _kept_by_rows(scaled: Float[Array, "R V"], how: SamplingInput) -> Bool[Array, "R V"]:
    """What `_kept` does, a row at a time: its passes then stay in the cache of a core."""

    def one(row):
        return _kept(*jax.tree.map(lambda each: each[None], row))[0]

    return jax.lax.map(one, (scaled, how))


def _ordered(values: Float[Array, "R V"]) -> UInt[Array, "R V"]:
    """Unsigned integers in the order of the floats."""
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _largest(holds, wanted: Bool[Array | np.ndarray, "R"]) -> UInt[Array, "R"]:
    """The largest threshold a row for which `holds` (true for 0, and monotone) is still true; 0 for
    rows that want none.
    """

    def one_bit(index, threshold):
        raised = threshold | (jnp.uint32(1) << (31 - index).astype(jnp.uint32))
        return jnp.where(holds(raised), raised, threshold)

    passes = jnp.where(jnp.any(wanted), 32, 0)
    threshold = jax.lax.fori_loop(0, passes, one_bit, jnp.zeros(wanted.shape[0], jnp.uint32))
    return jnp.where(wanted, threshold, 0)
