"""Shows what compiling a run's programs has found: a table, a record for other programs, and what a run costs."""

from collections.abc import Sequence
from typing import Any

from headsteer_jax.compilation.outcome import Outcome

HEADER = (
    "program", "compile", "arguments", "temporary", "of memory", "FLOPs", "model", "estimate", "collectives in a call",
)  # fmt: skip
WIDTHS = (34, 8, 9, 9, 9, 8, 6, 8, 0)


def format_bytes(count: float | None) -> str:
    """Format a number of bytes with three digits."""
    if count is None:
        return "-"
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count / size < 999.5 else f"{count / size:.0f} {unit}"
    return f"{count:.0f} B"


def format_count(count: float | None) -> str:
    """Format a large number with three digits and the metric prefix."""
    if count is None:
        return "-"
    for prefix, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {prefix}"
    return f"{count:.3g}"


def format_header() -> str:
    """Format the table's first line."""
    return _join(HEADER)


def format_outcome(outcome: Outcome) -> str:
    """Format one program's line of the table."""
    title = f"{outcome.stage}: {outcome.name}"
    if outcome.same_as:
        return _join((title, f"the same program as {outcome.same_as}"))
    if outcome.problem:
        return _join((title, f"{outcome.seconds:.0f} s", outcome.problem))
    used = outcome.needed_bytes and outcome.hbm_bytes and outcome.needed_bytes / outcome.hbm_bytes
    seconds = outcome.estimated_seconds
    communication = ", ".join(
        f"{count:.0f} {kind} of {format_bytes(size)}" for kind, (count, size) in sorted(outcome.collectives.items())
    )
    return _join((
        title, f"{outcome.seconds:.0f} s", format_bytes(outcome.argument_bytes), format_bytes(outcome.temporary_bytes),
        f"{used:.1%}" if used else "-", format_count(outcome.flops),
        "-" if outcome.model_share is None else f"{outcome.model_share:.0%}",
        "-" if seconds is None else f"{1000 * seconds:.3g} ms", communication or "none",
    ))  # fmt: skip


def _join(cells: Sequence[str]) -> str:
    """Join the cells of a line, all but the last two in columns."""
    return "  ".join(
        f"{cell:<{width}}" if number == 0 else f"{cell:>{width}}"
        for number, (cell, width) in enumerate(zip(cells, (*WIDTHS[: len(cells) - 1], 0), strict=True))
    )


def estimate_chip_hours(flops: float, peak_tflops: float, mfu: float) -> float:
    """Estimate the hours of one chip that FLOPs take at a share `mfu` of its peak."""
    return flops / (mfu * peak_tflops * 1e12) / 3600


def format_totals(outcomes: Sequence[Outcome], chips: int, peak_tflops: float | None, mfu: float) -> list[str]:
    """Format the lines below the table: the time to compile, the FLOPs of a run, and the hours that these take."""
    flops = sum(outcome.total_flops for outcome in outcomes)
    compiled = [outcome for outcome in outcomes if not outcome.same_as]
    seconds, cpu_seconds = (sum(getattr(outcome, name) for outcome in outcomes) for name in ("seconds", "cpu_seconds"))
    lines = [
        f"compiling: {seconds:.0f} s for {len(compiled)} programs, {cpu_seconds:.0f} s of the processor",
        f"a whole run: {format_count(flops)}FLOP",
    ]
    if peak_tflops:
        hours = estimate_chip_hours(flops, peak_tflops, mfu)
        lines[1] += (
            f", which at an MFU of {mfu:.0%} is {hours:.3g} chip-hours, or {60 * hours / chips:.3g} minutes on {chips} "
            "devices, without compiling and reading"
        )
    return lines


def to_record(outcomes: Sequence[Outcome], header: dict[str, Any]) -> dict[str, Any]:
    """Make the content of the JSON file."""
    rows = []
    for outcome in outcomes:
        row = outcome._asdict() | {"model_share": outcome.model_share, "total_flops": outcome.total_flops}
        row["collectives"] = {
            kind: {"count": count, "bytes": size} for kind, (count, size) in outcome.collectives.items()
        }
        rows.append(row)
    return header | {
        "compile_seconds": sum(outcome.seconds for outcome in outcomes),
        "compile_cpu_seconds": sum(outcome.cpu_seconds for outcome in outcomes),
        "total_flops": sum(outcome.total_flops for outcome in outcomes),
        "programs": rows,
    }
