"""What to use instead of a flag that is not there."""

import pytest

from kairos_jax.config.keys import config_keys
from kairos_jax.process.hints import FAMILIAR, instead

KNOWN = {f"config.{each.name}" for each in config_keys()} | {
    *("model", "port", "http_port", "api_keys_file", "cors_origins", "otlp_endpoint"),
    *("public_tls_cert", "public_tls_key"),
}


def test_all_that_is_named_is_there():
    for name, flags in FAMILIAR.items():
        assert set(flags) <= KNOWN, name
        assert name == name.lower().replace("-", "_")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("max-model-len", "use --config.max_context"),
        ("max_model_len", "use --config.max_context"),
        (
            "tensor-parallel-size",
            "use --config.prefill.devices and --config.decode.devices",
        ),
        ("tp", "use --config.prefill.devices and --config.decode.devices"),
        ("served-model-name", "use --config.served_model_name"),
        (
            "gpu-memory-utilization",
            "use --config.prefill.kv_tokens and --config.decode.kv_tokens",
        ),
        ("max-num-seqs", "use --config.decode.max_batch"),
        ("max-num-batched-tokens", "use --config.prefill.max_chunk"),
        ("dtype", "use --config.dtype"),
        (
            "no-enable-prefix-caching",
            "use --config.prefill.prefix_cache and --config.decode.prefix_cache",
        ),
        ("api-key", "use --api_keys_file"),
        ("http-port", "it is --http_port here"),
        ("prot", "did you mean --port?"),
        ("max_contxt", "did you mean --config.max_context?"),
        (
            "config.decode.polcy",
            "did you mean --config.decode.policy or --config.prefill.policy? "
            "`kairos config` lists the keys",
        ),
        ("config.zzz", "`kairos config` lists the keys"),
        ("zzzzzz", ""),
    ],
)
def test_names_of_other_servers_and_near_names(name, words):
    assert instead(name, KNOWN) == words


def test_what_a_binary_does_not_have_is_not_named():
    assert instead("max-model-len", {"port"}) == ""
