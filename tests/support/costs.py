"""Step times by hand, of engines of one job."""

from schedulers.cost import StepCost


def prefills(base_s: float, per_token_s: float, per_token_sq_s: float = 0.0) -> StepCost:
    """per_token_sq_s: of a prompt of n tokens, for each of n * n."""
    return StepCost(base_s, per_token_s=per_token_s, per_pair_s=2 * per_token_sq_s)


def decodes(
    base_s: float,
    per_seq_s: float,
    per_context_token_s: float = 0.0,
    form: str = "ragged",
    buckets: tuple[int, ...] = (),
    factors: tuple[float, ...] = (),
) -> StepCost:
    """As `StepCost` has them."""
    own = {"per_seq_s": per_seq_s, "per_context_token_s": per_context_token_s}
    return StepCost(base_s, **own, form=form, buckets=buckets, factors=factors)
