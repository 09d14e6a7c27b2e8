import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from models.config import ModelConfig
from models.params import abstract_params, init_params
from models.sharding import Rules, make_mesh

CONFIG = ModelConfig(
    name="llama",
    vocab_size=24,
    hidden_size=8,
    num_layers=1,
    num_heads=6,
    num_kv_heads=2,
    head_dim=4,
    mlp_size=12,
)


def test_the_default_is_tensor_parallel():
    rules = Rules()
    assert rules.spec(("vocab", "embed")) == PartitionSpec("tensor", None)
    assert rules.spec(("embed", "heads", "head_dim")) == PartitionSpec(None, "tensor", None)
    assert rules.spec((None, "kv_heads", None)) == PartitionSpec(None, "tensor", None)


def test_a_clash_is_refused():
    with pytest.raises(ValueError, match="two dimensions on one mesh axis"):
        Rules(embed="tensor").spec(("embed", "mlp"))


def test_an_unknown_axis_is_refused():
    with pytest.raises(ValueError, match="'width'"):
        Rules().spec(("width",))


def test_a_mesh_has_one_auto_axis_over_the_devices_in_order():
    devices = jax.devices()[2:5]
    mesh = make_mesh(devices)
    assert dict(mesh.shape) == {"tensor": 3}
    assert mesh.axis_types == (AxisType.Auto,)
    assert list(mesh.devices.flat) == devices
    with pytest.raises(ValueError, match="at least 1 device"):
        make_mesh([])


def test_a_dimension_that_does_not_divide_is_named():
    mesh = make_mesh(jax.devices()[:4])
    message = r"kv_heads of size 2 cannot be split evenly over the 4 devices of mesh axis 'tensor'"
    with pytest.raises(ValueError, match=message):
        Rules().sharding(mesh, (None, "kv_heads"), (5, 2))
    with pytest.raises(ValueError, match=r"weight 'layers\.0\.attention\.o': heads of size 6"):
        abstract_params(CONFIG, jnp.float32, mesh, Rules())
    with pytest.raises(ValueError, match="not 'data' for 'embed'"):
        Rules(embed="data").sharding(mesh, ("embed",), (8,))


@pytest.mark.parametrize(
    ("kv_heads", "count", "copies"),
    [(2, 1, 1), (2, 2, 1), (8, 4, 1), (2, 4, 2), (3, 2, 2), (3, 6, 2), (6, 4, 2), (1, 8, 8)],
)
def test_kv_heads_are_there_as_often_as_it_takes_to_split_them(kv_heads, count, copies):
    mesh = make_mesh(jax.devices()[:count])
    assert Rules().kv_copies(mesh, kv_heads) == copies
    assert Rules(kv_heads=None).kv_copies(mesh, kv_heads) == 1
    whole = Rules().without_copies(mesh, kv_heads).kv_heads is None
    assert whole == (copies > 1)


@pytest.mark.parametrize("count", [1, 2])
def test_weights_are_declared_without_being_allocated(count):
    mesh = make_mesh(jax.devices()[:count])
    before = len(jax.live_arrays())
    abstract = abstract_params(CONFIG, jnp.bfloat16, mesh, Rules())
    assert len(jax.live_arrays()) == before
    assert abstract["layers.0.attention.q"].shape == (8, 6, 4)
    assert abstract["layers.0.attention.q"].sharding.spec == PartitionSpec(None, "tensor", None)
    params = init_params(CONFIG, jax.random.key(0), jnp.bfloat16, mesh, Rules())
    assert params.keys() == abstract.keys()
    for path, leaf in abstract.items():
        assert params[path].shape == leaf.shape
        assert params[path].dtype == leaf.dtype == jnp.bfloat16
        assert params[path].sharding.is_equivalent_to(leaf.sharding, len(leaf.shape))
