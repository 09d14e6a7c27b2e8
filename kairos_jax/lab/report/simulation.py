"""What the simulator prints for a person; `kairos_jax.simulate` has the figures themselves."""

from collections.abc import Iterator, Mapping
from typing import Any


def run_text(answer: Mapping[str, Any]) -> str:
    """The figures of a run, in some ten lines."""
    return "\n".join(_run_lines(answer))


def _run_lines(answer: Mapping[str, Any]) -> Iterator[str]:
    settings = answer["settings"]
    rate = "at once" if settings["rate"] is None else f"at {settings['rate']:.3g} requests/s"
    bound, strict = answer["ttft_bound"], answer["strict_attainment"]
    deciles = ["-" if each is None else f"{each:.0f}" for each in answer["e2e_by_output_decile"]]
    yield (
        f"{answer['num_requests']} requests {rate}, {settings['layout']}, "
        f"{settings['prefill_policy']} + {settings['decode_policy']}"
    )
    yield ""
    yield (
        f"attained %   TTFT {answer['ttft_attainment']:.1f}"
        + ("" if bound is None else f" (at best {bound:.1f})")
        + f"   TPOT {answer['tpot_attainment']:.1f}   both {answer['e2e_attainment']:.1f}"
        + ("" if strict is None else f"   every token {strict:.1f}")
    )
    yield f"both %, by tenths of output length, shortest first   {' '.join(deciles)}"
    classes = answer["e2e_by_class"]
    for each in classes if len(classes) > 1 else ():
        yield (
            f"class        {each['share']:.0%} with TTFT {each['ttft']:g} s, "
            f"TPOT {1000 * each['tpot']:g} ms:   TTFT {each['ttft_attainment']:.1f}"
            f"   TPOT {each['tpot_attainment']:.1f}   both {each['e2e_attainment']:.1f}"
        )
    yield (
        f"goodput      {answer['goodput_rps']:.2f} requests/s"
        f"   decode {answer['decode_tokens_per_s']:.0f} tokens/s"
    )
    yield f"TTFT s       {_quantiles(answer['ttft_s'], 1)}"
    yield f"TPOT ms      {_quantiles(answer['tpot_s'], 1000)}"
    yield (
        f"longest s    {_seconds(answer['latency_max_s'])}"
        f"   of those that missed their SLO {_seconds(answer['demoted_latency_max_s'])}"
    )
    yield ""
    yield f"simulated in {answer['wall_s']:.1f} s"
    if "explained" in answer:
        yield f"\nrequest {settings['explain']}, from its arrival:"
        yield from answer["explained"]


def advice_text(answer: Mapping[str, Any]) -> str:
    """A comparison of layouts, and what to make of it."""
    costs = [each.get("cost_of_million_tokens") for each in answer["ranking"]]
    priced = any(cost is not None for cost in costs)
    head = "   a million output tokens" if priced else ""
    lines = [f"{'layout':24} requests/s{head}   % attained at requests/s"]
    for each, cost in zip(answer["ranking"], costs, strict=True):
        curve = "  ".join(f"{percent:.0f} at {rate:.3g}" for rate, percent in each["curve"])
        price = f"   {'-' if cost is None else f'{cost:.3g}':>23}" if priced else ""
        lines.append(f"{each['layout']:24} {each['rate']:10.3g}{price}   {curve}")
    lines += [
        "",
        answer["answer"],
        f"By the first {answer['num_requests']} requests of {answer['settings']['trace']} at most, "
        f"each rate within {answer['resolution']:.0%}; too few requests make rates too high. "
        f"Took {answer['wall_s']:.0f} s.",
    ]
    return "\n".join(lines)


def _quantiles(values: Mapping[str, float | None], scale: float) -> str:
    return "   ".join(
        f"{name} {'-' if value is None else f'{scale * value:.4g}'}"
        for name, value in values.items()
    )


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
