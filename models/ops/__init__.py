"""Operations with one signature and a file per backend."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from models.config import ModelConfig
from models.kv_cache import Layout
from models.ops import (
    attention_cpu,
    attention_gpu,
    attention_hopper,
    attention_tpu,
    native,
)
from models.ops.attention import LAYOUT, Attention, reference
from models.ops.linear import Linear, as_matrix
from models.ops.linear import linear as xla_linear
from models.sharding import Rules

Contexts = Literal["ragged", "padded"]
"""How a decode step reads the contexts of its sequences. "ragged": each at its own length, in whole
pages or blocks. "padded": all of them, those of padding too, at the length of the longest."""


def _all(dtype: DTypeLike, head_dim: int, page_size: int) -> bool:
    return True


class Kernels(NamedTuple):
    """What a backend does its own way.

    attention: takes a pool in this layout. pack: brings a weight [I, O] into the form that `linear`
    takes; None: weights stay as they were declared. unties: a head that is tied to the embedding is
    packed as a weight of its own. contexts: how `attention` reads them in a decode step. takes:
    whether the kernels compute with a dtype, head dim and page size; what they do not take they
    leave to XLA (`attention_cpu`), which reads contexts padded. on_accelerator: a step of a few
    tokens takes as long as one of a few more.
    """

    attention: Attention
    layout: Layout = LAYOUT
    linear: Linear = xla_linear
    pack: Callable[[Float[Array, "I O"]], Float[Array, "..."]] | None = None
    unties: bool = False
    contexts: Contexts = "padded"
    takes: Callable[[DTypeLike, int, int], bool] = _all
    on_accelerator: bool = False

    def contexts_of(self, dtype: DTypeLike, head_dim: int, page_size: int) -> Contexts:
        """How a decode step of such arrays reads contexts."""
        return self.contexts if self.takes(dtype, head_dim, page_size) else "padded"


KERNELS = {
    "reference": Kernels(reference),
    "cpu": Kernels(attention_cpu.attention),
    # `native.load` comes first, and the mesh must be one device.
    "native": Kernels(
        native.attention,
        linear=native.linear,
        pack=native.pack,
        unties=True,
        contexts="ragged",
        takes=native.takes,
    ),
    "gpu": Kernels(
        attention_gpu.attention, attention_gpu.LAYOUT, pack=as_matrix, on_accelerator=True
    ),
    "gpu_hopper": Kernels(
        attention_hopper.attention,
        attention_hopper.LAYOUT,
        pack=as_matrix,
        contexts="ragged",
        takes=attention_hopper.takes,
        on_accelerator=True,
    ),
    "tpu": Kernels(
        attention_tpu.attention,
        attention_tpu.LAYOUT,
        pack=as_matrix,
        contexts="ragged",
        on_accelerator=True,
    ),
}


def on_mesh(
    kernels: Kernels, config: ModelConfig, mesh: Mesh | AbstractMesh, rules: Rules
) -> Kernels:
    """The kernels for this mesh: each device attends with the heads that it has. XLA cuts its own
    operations by itself, but not a kernel. config: as `models.params.pack_config` gave it.
    """
    if mesh.size == 1:
        return kernels
    heads = rules.spec((None, "heads", None))
    kv_heads = rules.spec((None, "kv_heads", None))
    shardings = kernels.layout.shardings(config, mesh, rules)
    layer = jax.tree.map(lambda sharding: sharding.spec, shardings)
    attention = jax.shard_map(
        kernels.attention,
        mesh=mesh,
        in_specs=(heads, kv_heads, kv_heads, layer, PartitionSpec()),
        out_specs=(heads, layer),
        check_vma=False,
    )
    return kernels._replace(attention=attention)
