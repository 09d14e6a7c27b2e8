"""What answers the requests of a server: the checks of a request, the router, the model's card."""

from dataclasses import dataclass

from kairos_jax.api.validator import Validator
from kairos_jax.config import ServerConfig
from kairos_jax.engine.model import Model
from kairos_jax.observe.metrics import Metrics
from kairos_jax.routing.router import Router
from kairos_jax.rpc import kairos_pb2 as pb


@dataclass(frozen=True, slots=True)
class Backend:
    """What answers requests, once it is ready. metrics: those of its router. model: what `GetModel`
    tells of it.
    """

    validator: Validator
    router: Router
    metrics: Metrics
    model: pb.Model

    @classmethod
    def of(
        cls,
        config: ServerConfig,
        model: Model,
        router: Router,
        metrics: Metrics,
        mesh_sizes: tuple[int, int],
        device_kind: str,
        trusts_templates: bool,
    ) -> "Backend":
        """mesh_sizes: devices of an instance that prefills, and of one that decodes.
        trusts_templates: whether conversations may bring chat templates.
        """
        description, tokenizer = model.checkpoint.config, model.tokenizer
        name = config.name
        return cls(
            validator=Validator(
                name, description.vocab_size, model.eos_ids, config, tokenizer, trusts_templates
            ),
            router=router,
            metrics=metrics,
            model=pb.Model(
                name=name,
                max_context=config.max_context,
                vocab_size=description.vocab_size,
                max_tokens=config.max_tokens,
                default_slo=pb.Slo(ttft_s=config.slo.ttft, tpot_s=config.slo.tpot),
                prefill_policy=config.prefill.policy,
                decode_policy=config.decode.policy,
                prefill_mesh_size=mesh_sizes[0],
                decode_mesh_size=mesh_sizes[1],
                device_kind=device_kind,
                has_tokenizer=tokenizer is not None,
                has_chat_template=tokenizer is not None and tokenizer.chat_template is not None,
            ),
        )
