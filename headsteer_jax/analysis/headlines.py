"""What a finished run found, in up to six lines for the terminal."""

from collections.abc import Mapping
from typing import Any

from headsteer_jax.analysis.claims import find_subject

# subjects of claims that are counted by themselves
APART = {"autoencoder": "what the autoencoder adds", "pruning": "what steering adds to plain pruning"}


def list_headlines(summary: Mapping[str, Any]) -> list[str]:
    """List what was found: the model, the steering, its controls, the claims, the autoencoder and what it took.

    Args:
      summary: the content of summary.json. If `class` is not among the strategies, there are no claims, and the first
        strategy stands in its place.
    """
    strategies = [name for name in summary["steering"] if name != "unsteered"]
    main = "class" if "class" in strategies else strategies[0]
    lines = [_describe_model(summary), _describe_steering(summary, main), _describe_controls(summary, main)]
    if "claims" in summary:
        lines.append(_describe_claims(summary))
    return [*lines, _describe_autoencoder(summary), _describe_resources(summary)]


def _describe_model(summary: Mapping[str, Any]) -> str:
    """Describe the gated model beside its dense control."""
    layer, unsteered = summary["last_layer"], summary["steering"]["unsteered"]
    control = summary["dense_control_accuracy"] or summary["dense_accuracy"]
    beside = f"; the dense model: {control:.1%}" if control is not None else ""
    return (
        f"model: accuracy {unsteered['accuracy']:.1%} with {unsteered['usage']:.1%} of layer {layer['layer']}'s gates "
        f"open{beside}"
    )


def _describe_steering(summary: Mapping[str, Any], main: str) -> str:
    """Describe steering by the main strategy, with the interval of its change."""
    row = summary["steering"][main]
    low, high = (100 * end for end in row["accuracy_change_ci"])
    return (
        f"{main} steering, alpha {row['alpha']:g}: accuracy {row['accuracy']:.1%} with {row['usage']:.1%} open; change "
        f"{low:+.2f} to {high:+.2f} points; classes saved: {row['classes_saved']}"
    )


def _describe_controls(summary: Mapping[str, Any], main: str) -> str:
    """Describe which strategies save more than the main one, and how many save less."""
    usage = {name: row["usage"] for name, row in summary["steering"].items() if name != "unsteered"}
    lower = sorted((name for name in usage if usage[name] < usage[main]), key=usage.__getitem__)
    named = ", ".join(f"{name} {usage[name]:.1%}" for name in lower) or "none"
    more = sum(share > usage[main] for share in usage.values())
    return f"strategies that leave fewer open at their own choice: {named}; {more} leave more"


def _describe_claims(summary: Mapping[str, Any]) -> str:
    """Count the claims that hold, and name the first that fails; stricter comparisons are counted by themselves."""
    held: dict[str, list[bool]] = {}
    failed = []
    for claim in summary["claims"]:
        if claim["holds"] is not None:
            about = find_subject(claim["claim"])
            subject = about if about in APART else ""
            held.setdefault(subject, []).append(claim["holds"])
            if not claim["holds"] and not subject:
                failed.append(claim["claim"])
    main = held.pop("", [])
    line = f"claims: {sum(main)} of {len(main)} hold"
    if failed:
        line += f"; the first that does not: {failed[0]}"
    return line + "".join(f"; on {APART[about]}, {sum(flags)} of {len(flags)} hold" for about, flags in held.items())


def _describe_autoencoder(summary: Mapping[str, Any]) -> str:
    """Describe how well the autoencoders explain the residual on test."""
    sae = summary["sae"]
    return (
        f"autoencoder: {sae['explained_variance']:.1%} of the variance by {sae['l0']:.3g} of {sae['latents']} latents, "
        f"{sae['gate_agreement']:.1%} of the gates agree, {sae['dead_fraction']:.1%} of the latents are dead"
    )


def _describe_resources(summary: Mapping[str, Any]) -> str:
    """Describe the time and memory that it took."""
    seconds = summary["seconds"]
    parts = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    return f"took {sum(seconds.values()):.0f} s ({parts}) and {summary['peak_memory_bytes'] / 2**30:.1f} GiB of memory"
