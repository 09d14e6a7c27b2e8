"""Which contexts of a model can be served."""

import json
import shutil

import fakes
import pytest

from kairos_jax.engine.model import open_model
from kairos_jax.process.command import UsageError


@pytest.mark.parametrize(
    ("window", "limit", "message"),
    [
        (None, 512, "must be at most the model's 512, got 513"),
        (64, 64, "must be at most the model's 64, the sliding window of its attention, got 65"),
    ],
)
def test_a_context_beyond_the_exact_one_is_refused(golden, tmp_path, window, limit, message):
    model = shutil.copytree(golden / "mistral", tmp_path / "mistral")
    raw = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(raw | {"sliding_window": window}))
    config = fakes.altered(model=str(model), max_context=limit, max_tokens=8)
    assert open_model(config).checkpoint.config.exact_context == limit
    with pytest.raises(UsageError, match=f"config.max_context {message}"):
        open_model(fakes.altered(model=str(model), max_context=limit + 1, max_tokens=8))
