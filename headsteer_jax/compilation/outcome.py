"""Compiles planned programs, and records what each takes of a device: time, memory, FLOPs and communication."""

import hashlib
import re
import time
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from headsteer_jax.compilation.hlo import summarise_program
from headsteer_jax.compilation.planned import PlannedProgram
from headsteer_jax.compilation.products import count_product_flops
from headsteer_jax.compilation.topology import Machine
from headsteer_jax.errors import HeadSteerError

NO_COLLECTIVES: Mapping[str, tuple[float, float]] = types.MappingProxyType({})
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Outcome(NamedTuple):
    """Holds what compiling a program has shown. Bytes and the compiler's counts are those of one device."""

    stage: str
    name: str
    calls: int  # in a whole run
    seconds: float  # to compile
    cpu_seconds: float = 0.0  # of the processor, all threads together, to compile
    same_as: str = ""  # a program before it that is identical, and is not compiled twice
    problem: str = ""  # empty: it compiles and fits
    argument_bytes: int | None = None
    temporary_bytes: int | None = None
    needed_bytes: int | None = None  # arguments, temporaries, results that need new memory, and the code
    hbm_bytes: int | None = None  # of a device; None: not known
    flops: float | None = None  # the products of one call, on all devices
    model_flops: float | None = None  # those that the model needs, on all devices; None: not defined
    compiler_flops: float | None = None  # the compiler's own count, each loop's body once
    collectives: Mapping[str, tuple[float, float]] = NO_COLLECTIVES  # by kind: how many in a call, and their bytes
    estimated_seconds: float | None = None  # the TPU compiler's estimate of a call, without collectives

    @property
    def model_share(self) -> float | None:
        """The share of the products that the model needs."""
        return self.model_flops / self.flops if self.model_flops and self.flops else None

    @property
    def total_flops(self) -> float:
        """The FLOPs of all calls of a run: those that the model needs, if they are defined."""
        return self.calls * (self.model_flops or self.flops or 0.0)


def compile_programs(planned: Iterable[PlannedProgram], machine: Machine) -> Iterator[Outcome]:
    """Compile programs one after the other, identical ones once."""
    known: dict[str, Outcome] = {}
    for program in planned:
        yield _compile_program(program, machine, known)


def _compile_program(program: PlannedProgram, machine: Machine, known: dict[str, Outcome]) -> Outcome:
    """Compile one program; `known` has the outcomes of those before it by a hash of their text."""
    outcome = Outcome(program.stage, program.name, program.calls, 0.0, hbm_bytes=machine.hbm_bytes)
    began, began_cpu = time.monotonic(), time.process_time()
    try:
        with jax.set_mesh(program.mesh):
            traced = program.trace()
            lowered = traced.lower()
            digest = hashlib.sha256(f"{program.mesh}{lowered.as_text()}".encode()).hexdigest()
            if digest in known:
                first = known[digest]
                return first._replace(
                    stage=program.stage, name=program.name, calls=program.calls, seconds=0.0, cpu_seconds=0.0,
                    same_as=f"{first.stage}: {first.name}",
                )  # fmt: skip
            compiled = lowered.compile()
    except HeadSteerError as error:
        return outcome._replace(problem=str(error), seconds=time.monotonic() - began)
    except jax.errors.JaxRuntimeError as error:
        problem, needed = explain_failure(str(error), program.remedies)
        return outcome._replace(problem=problem, needed_bytes=needed, seconds=time.monotonic() - began)
    outcome = outcome._replace(seconds=time.monotonic() - began, cpu_seconds=time.process_time() - began_cpu)
    known[digest] = _measure(outcome, program, traced, compiled, machine)
    return known[digest]


def _measure(
    outcome: Outcome, program: PlannedProgram, traced: jax.stages.Traced, compiled: jax.stages.Compiled,
    machine: Machine,
) -> Outcome:  # fmt: skip
    """Read the figures of a compiled program."""
    plan: Any = compiled.memory_analysis()
    results = plan.output_size_in_bytes - plan.alias_size_in_bytes
    needed = plan.argument_size_in_bytes + plan.temp_size_in_bytes + results + plan.generated_code_size_in_bytes
    costs = compiled.cost_analysis()
    totals = summarise_program(compiled.as_text() or "")
    problem = ""
    if machine.hbm_bytes is not None and needed > machine.hbm_bytes:
        problem = describe_excess(needed, machine.hbm_bytes, program.remedies)
    return outcome._replace(
        problem=problem,
        argument_bytes=plan.argument_size_in_bytes,
        temporary_bytes=plan.temp_size_in_bytes,
        needed_bytes=needed,
        flops=count_product_flops(traced.jaxpr),
        model_flops=program.model_flops,
        compiler_flops=dict(costs).get("flops") if isinstance(costs, dict) else None,
        collectives=totals.collectives,
        estimated_seconds=totals.cycles / machine.gigahertz / 1e9 if machine.gigahertz and totals.cycles else None,
    )


def describe_excess(needed: float, limit: float, remedies: tuple[str, ...]) -> str:
    """Describe by how much a program exceeds a device's memory, and what would help."""
    return (
        f"needs {needed / 2**30:.2f} GiB, {(needed - limit) / 2**30:.2f} GiB more than a device has; "
        f"try {' or '.join(remedies)}"
    )


def explain_failure(message: str, remedies: tuple[str, ...]) -> tuple[str, int | None]:
    """Explain why a compiler failed, in one line -> the line, and the bytes that were needed if it says them."""
    message = " ".join(message.split())
    size = r"([\d.]+)([KMGT]?)"
    sizes = re.search(rf"Used {size} of {size}", message) or re.search(
        rf"\({size}\) exceeds available HBM \({size}\)", message
    )
    if "RESOURCE_EXHAUSTED" not in message or not sizes:
        return f"does not compile ({message[:300]})", None
    needed, limit = (float(sizes[i]) * UNITS[sizes[i + 1]] for i in (1, 3))
    return describe_excess(needed, limit, remedies), int(needed)
