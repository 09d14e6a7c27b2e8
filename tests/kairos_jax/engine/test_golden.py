"""The default model, served by two engines, against Hugging Face transformers in f32."""

import asyncio
import json

import fakes
import jax
import pytest

from kairos_jax.engine.engine import JaxEngine
from kairos_jax.engine.functions import Shapes
from kairos_jax.process.hub import DEFAULT_MODEL, PACKAGED_MODELS, cached_path
from models.checkpoint import open_checkpoint
from models.sharding import Rules, make_mesh
from schedulers.ledger.instance import Limits, Role
from schedulers.ledger.request import Request, Slo

PATH = cached_path(PACKAGED_MODELS[DEFAULT_MODEL])
# One shape for each engine, to compile little.
LIMITS = Limits(max_batch=24, max_chunk=256, max_context=768, page_size=64, num_pages=24 * 12)


def engine(role, device, shapes, kernels):
    checkpoint, mesh, rules = open_checkpoint(PATH), make_mesh([device]), Rules()
    params = checkpoint.load(mesh, rules, "float32")
    return JaxEngine(checkpoint.config, params, mesh, rules, LIMITS, shapes, kernels=kernels)


@pytest.mark.skipif(not PATH.exists(), reason="the default model is not in the cache: make model")
def test_greedy_tokens_are_those_of_transformers(golden, native_kernels):
    cases = json.loads((golden / "smollm2.json").read_text())["cases"]
    assert len(cases) >= 20
    lengths = [len(case["prompt"]) for case in cases]
    assert min(lengths) <= 5
    assert max(lengths) >= 600
    requests = [
        Request(str(i), 0.0, case["prompt"], len(case["output"]), Slo(900, 900))
        for i, case in enumerate(cases)
    ]
    prefill = engine(
        Role.PREFILL, jax.devices()[0], Shapes(Role.PREFILL, ((256, 24),)), native_kernels
    )
    decode = engine(Role.DECODE, jax.devices()[1], Shapes(Role.DECODE, ((24, 24),)), native_kernels)
    answers = asyncio.run(fakes.serve((prefill, decode), requests))
    for case, each in zip(cases, requests, strict=True):
        got = [token.id for token in answers[each.id]]
        assert len(got) == 64
        assert got == case["output"], f"prompt {case['text'][:40]!r}"
