"""Compiles the programs of a run for a machine, prints the table as it goes, and writes the record."""

from collections.abc import Sequence
from typing import Any

import jax

from headsteer_jax.compilation.listing import (
    estimate_chip_hours,
    format_header,
    format_outcome,
    format_totals,
    to_record,
)
from headsteer_jax.compilation.outcome import Outcome, compile_programs
from headsteer_jax.compilation.planned import describe_experiment
from headsteer_jax.compilation.programs import list_programs
from headsteer_jax.compilation.topology import Machine
from headsteer_jax.config.schema import Config
from headsteer_jax.data.dataset import Dataset
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.model.macs import peak_tflops


def compile_run(
    config: Config, dataset: Dataset, machine: Machine, stages: Sequence[str], mfu: float
) -> tuple[dict[str, Any], list[Outcome]]:
    """Compile the programs of a run's stages, and print a line for each.

    Args:
      dataset: whose sizes decide the programs' shapes.
      stages: names of stages; some have no programs.
      mfu: the share of the peak that training is assumed to reach.

    Returns:
      The record for a JSON file, and what was found of each program.

    Raises:
      HeadSteerError: the machine's devices cannot be used in the way that the config says.
    """
    experiment = describe_experiment(config, dataset, machine.devices)
    kind, count = machine.devices[0].device_kind, len(machine.devices)
    print(f"for {machine.name}: {count} devices ({kind}), hosts: {experiment.hosts}")
    print(format_header(), flush=True)
    outcomes = []
    for outcome in compile_programs(list_programs(experiment, tuple(stages)), machine):
        print(format_outcome(outcome), flush=True)
        outcomes.append(outcome)
    peak = peak_tflops(config, machine.devices[0])
    for line in format_totals(outcomes, len(machine.devices), peak, mfu):
        print(line)
    flops = sum(outcome.total_flops for outcome in outcomes)
    header = {
        "machine": machine.name, "device": machine.devices[0].device_kind, "devices": len(machine.devices),
        "hosts": experiment.hosts, "jax": jax.__version__, "mfu": mfu,
        "chip_hours": estimate_chip_hours(flops, peak, mfu) if peak else None,
    }  # fmt: skip
    return to_record(outcomes, header), outcomes


def check_outcomes(outcomes: Sequence[Outcome]) -> None:
    """Check that every program compiles and fits.

    Raises:
      HeadSteerError: one does not; the message has the first one's problem.
    """
    failed = [outcome for outcome in outcomes if outcome.problem]
    if failed:
        more = f" (and {len(failed) - 1} more, see above)" if len(failed) > 1 else ""
        raise HeadSteerError(f"{failed[0].stage}: {failed[0].name}: {failed[0].problem}{more}")
