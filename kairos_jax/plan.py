"""Says what a config needs of chips that are not here, and how long its steps would take there.

kairos plan --config=llama3_8b:gpu1 --fast
kairos plan --config=llama3_8b:v5e8 --output=profile.json
kairos simulate --profile=profile.json --trace=synthetic --advise --devices=8 --ttft=1 --tpot=0.05

With --fast by shapes alone, in seconds. Without, the steps are also compiled for the chip, by its
own compiler, which needs no chip. Memory is then what the compiler says, step times are reckoned
from the operations and the bytes of the compiled steps, and programs that do what they should not
are named. The profile that --output writes says `source: predicted`.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from absl import flags
from rich import box
from rich.console import Console
from rich.table import Table

from kairos_jax.config import ConfigError, ServerConfig
from kairos_jax.config.chips import CHIPS, Chip
from kairos_jax.lab import topology
from kairos_jax.lab.planning import (
    Counted,
    Needs,
    Prediction,
    Shares,
    check_fits,
    kernels_of,
    needs_of,
    predict,
)
from kairos_jax.lab.shapes import shape_of
from kairos_jax.process import early, hub, launch
from kairos_jax.process.command import UsageError
from kairos_jax.process.outputs import file_to_write
from models.checkpoint import open_checkpoint
from models.config import ModelConfig
from schedulers.ledger.instance import Role

_WORDS = {Role.PREFILL: "prefill", Role.DECODE: "decode", Role.BOTH: "both"}
# Of the programs that differ from the largest in size alone.
FEW_LAYERS = 2


def define_flags() -> None:
    """Beside those of the config."""
    assumed = Shares()
    number = partial(flags.DEFINE_float, lower_bound=0.0)
    flags.DEFINE_enum("chip", None, list(CHIPS), "Chip; default: the config's.")
    flags.DEFINE_boolean("fast", False, "Use shapes alone, compile nothing.")
    number("of_bandwidth", assumed.bandwidth, "Assumed: share of a chip's bandwidth.")
    number("of_flops", assumed.flops, "Assumed: share of a chip's operations a second.")
    number("of_link", assumed.link, "Assumed: share of the bandwidth between chips.")
    number("host_s", assumed.host_s, "Assumed: seconds that the host adds to each step.")
    flags.DEFINE_string("output", None, "File for the predicted profile.")


def model_of(config: ServerConfig) -> ModelConfig:
    """By its files, or, where they are not at hand, by sizes that are known."""
    known = shape_of(config.model)
    if known is not None:
        return known
    try:
        return open_checkpoint(hub.resolve_model(config.model)).config
    except ValueError as error:
        raise UsageError(str(error)) from error


def chip_of(config: ServerConfig, named: str | None) -> Chip:
    """The one that a flag names, or the config. Raises ConfigError."""
    name = named or config.chip
    if not name:
        raise ConfigError(f"config.chip is not given: give --chip, one of {', '.join(CHIPS)}")
    return CHIPS[name]


def compiled(
    config: ServerConfig, model: ModelConfig, chip: Chip, needs: dict[Role, Needs]
) -> dict[Role, list[Any]]:
    """The programs of each role, compiled; their temporaries go into `needs`."""
    from kairos_jax.lab import ahead

    few = ahead.with_layers(model, FEW_LAYERS)
    kernels = kernels_of(config, chip)
    built: dict[Role, list[Any]] = {}
    for role in needs:
        devices = topology.describe(chip, config.devices(role))
        make = partial(ahead.functions_of, config, role=role, devices=devices, kernels=kernels)
        built[role] = list(ahead.build(role, model, make(model=model), make(model=few), chip))
        steps = [each for each in built[role] if each.layers == model.num_layers]
        most = max((each.memory.temporaries for each in steps), default=0)
        needs[role] = replace(needs[role], temporaries=most)
    return built


def counted(model: ModelConfig, built: Sequence[Any]) -> list[Counted]:
    """Of a role's compiled steps, those with all layers; the one of the fewest tokens first."""
    return sorted(
        Counted(tokens, sequences, each.program.operations, each.moved)
        for each in built
        if each.size and each.layers == model.num_layers and not each.error
        for tokens, sequences in [each.size]
    )


def _table(name: str, *numbers: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    table.add_column(name)
    for head in numbers:
        table.add_column(head, justify="right")
    return table


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f}"


def show_memory(
    console: Console, config: ServerConfig, chip: Chip, needs: Sequence[Needs], known: bool
) -> None:
    """By part, of one device of each role."""
    heads = ("weights", "pool", "parked KV", "temporaries", "sum", "free", "largest kv_tokens")
    table = _table("GB of a device", *heads)
    for each in needs:
        sizes = (each.weights, each.pool, each.parked, each.temporaries, each.total)
        most = each.most_tokens(chip.memory, config.page_size)
        name = f"{_WORDS[each.role]}, {each.devices} x {chip.name}"
        free = _gb(chip.memory - each.total)
        table.add_row(name, *map(_gb, sizes), free, str(most))
    console.print(table)
    if not known:
        console.print("Temporaries are an estimate; without --fast the compiler says.")


def show_steps(console: Console, decode: Prediction, prefill: Prediction) -> None:
    """Predicted times beside the chip's limits."""
    config = decode.config
    table = _table("step", "predicted ms", "limit ms", "of limit")
    most, context = config.decode.max_batch, min(1024, config.max_context // 2)
    rows = [
        (f"decode {b} x {context}", decode.decode_s(b, context), decode.decode_limit_s(b, context))
        for b in sorted({1, max(most // 4, 1), most})
    ]
    chunks = {max(config.prefill.max_chunk // 4, 1), config.prefill.max_chunk}
    rows += [
        (f"prefill {n} tokens", prefill.prefill_s(n), prefill.prefill_limit_s(n))
        for n in sorted(chunks)
    ]
    for name, seconds, limit in rows:
        table.add_row(name, f"{1e3 * seconds:.2f}", f"{1e3 * limit:.2f}", f"{limit / seconds:.0%}")
    console.print(table)


def show_programs(console: Console, built: Sequence[Any]) -> None:
    """What the compiler made, and what is wrong with it."""
    numbers = ("temporaries GB", "Gflop", "GB moved", "collectives")
    table = _table("program", "layers", "compile s", *numbers)
    table.add_column("faults", overflow="fold")
    for each in built:
        table.add_row(
            f"{_WORDS[each.role]}: {each.name}",
            str(each.layers),
            f"{each.lower_s + each.compile_s:.1f}",
            _gb(each.memory.temporaries),
            f"{each.program.operations / 1e9:.0f}",
            _gb(each.moved),
            str(sum(each.program.collectives.values())),
            "; ".join([*each.faults, *(f"known: {words}" for words in each.known)]) or "none",
        )
    console.print(table)


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    early.interrupt_on_signals()
    values = flags.FLAGS
    output = file_to_write("output", values.output) if values.output else None
    config = launch.read_config()
    chip, model = chip_of(config, values.chip), model_of(config)
    shares = Shares(values.of_bandwidth, values.of_flops, values.of_link, values.host_s)
    needs = {role: needs_of(config, model, role, chip) for role in dict.fromkeys(config.roles)}
    for each in needs.values():
        check_fits(config, each, chip)
    console = Console()
    console.print(f"{config.model} on {chip.title}: {config.layout}", highlight=False)
    of_role: dict[Role, list[Any]] = {}
    if not values.fast:
        topology.prepare()
        of_role = compiled(config, model, chip, needs)
    built = [each for programs in of_role.values() for each in programs]
    show_memory(console, config, chip, list(needs.values()), known=bool(built))
    if built:
        show_programs(console, built)
    prefill, decode = (
        Prediction(model, config, needs[role], chip, shares, counted(model, of_role.get(role, ())))
        for role in (config.roles[0], config.roles[-1])
    )
    show_steps(console, decode, prefill)
    by = "as the compiled programs have them" if built else "by shapes"
    console.print(f"Operations and bytes: {by}. Assumed: {shares}.", highlight=False)
    if output is not None:
        profile = predict(prefill, decode)
        Path(output).write_text(json.dumps(profile, indent=1) + "\n")
        console.print(f"Profile: {output}", highlight=False)
    for each in needs.values():
        check_fits(config, each, chip)
    return int(any(each.faults for each in built))


if __name__ == "__main__":
    launch.define_config_flag()
    define_flags()
    launch.run(main)
