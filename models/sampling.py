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
    filtered = (how.top_k > 0) | (how.top_p < 1) | (how.min_p > 0)
    kept = jax.lax.cond(
        jnp.any(filtered & (how.temperature > 0)), lambda: _filter(scaled, how), lambda: scaled
    )

    def noise(seed, position):
        # As jax.random.key makes it of 64 bits, which needs JAX's x64 mode.
        key = jax.random.wrap_key_data(seed[::-1], impl="threefry2x32")
        key = jax.random.fold_in(key, position)
        return jax.random.gumbel(key, (logits.shape[1],), jnp.float32)

    gumbel = jax.vmap(noise)(how.seed, how.position)
    # XLA for TPU takes ten seconds longer to compile the noise and the argmax as one loop.
    noisy = jax.lax.optimization_barrier(kept + gumbel)
    return jnp.argmax(noisy, axis=-1).astype(jnp.int32)


def _filter(scaled: Float[Array, "R V"], how: SamplingInput) -> Float[Array, "R V"]:
    """Minus infinity for what top-k, then top-p, and min-p leave out. Ties at a border stay in, and
    so does the likeliest token, however little is to be kept. The largest of `scaled` is 0.

    Sort-free: the smallest kept logit is found bit by bit in an order-preserving integer form of
    the logits, 32 passes of compare and sum over the vocabulary for each filter.
    """
    keys = _ordered(scaled)
    vocab = scaled.shape[1]
    k = jnp.where(how.top_k > 0, jnp.minimum(how.top_k, vocab), vocab)
    floor = _largest(lambda t: jnp.sum(keys >= t[:, None], axis=1) >= k, keys)
    weights = jnp.where(keys >= floor[:, None], jnp.exp(scaled), 0.0)
    # A hair below the target: the sum of all the weights may round to less than itself.
    target = jnp.where(how.top_p < 1, how.top_p, 0.0) * weights.sum(axis=1) * (1 - 1e-6)

    def holds_top_p(t):
        return jnp.sum(jnp.where(keys >= t[:, None], weights, 0.0), axis=1) >= target

    nucleus = jnp.where(how.top_p < 1, _largest(holds_top_p, keys), floor)
    # A target below the least float is 0, and any threshold reaches it.
    threshold = jnp.minimum(jnp.maximum(floor, nucleus), keys.max(axis=1))
    keep = (keys >= threshold[:, None]) & (weights >= how.min_p[:, None])
    return jnp.where(keep, scaled, -jnp.inf)


def _ordered(values: Float[Array, "R V"]) -> UInt[Array, "R V"]:
    """Unsigned integers in the order of the floats."""
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _largest(holds, keys: UInt[Array, "R V"]) -> UInt[Array, "R"]:
    """The largest threshold a row for which `holds` (true for 0, and monotone) is still true."""

    def one_bit(index, threshold):
        raised = threshold | (jnp.uint32(1) << (31 - index).astype(jnp.uint32))
        return jnp.where(holds(raised), raised, threshold)

    return jax.lax.fori_loop(0, 32, one_bit, jnp.zeros(keys.shape[0], jnp.uint32))
