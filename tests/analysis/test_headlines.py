"""The six lines at the end of a run, against lines written by hand."""

from typing import Any

from headsteer_jax.analysis.headlines import list_headlines


def made_summary(control: float | None, holds: tuple[bool | None, ...]) -> dict[str, Any]:
    steered = {"alpha": 2.5, "accuracy": 0.9134, "accuracy_change_ci": [-0.004, 0.0125], "classes_saved": 3}
    return {
        "dense_accuracy": 0.95,
        "dense_control_accuracy": control,
        "last_layer": {"layer": 4},
        "steering": {
            "unsteered": {"accuracy": 0.9, "usage": 0.8},
            "class": steered | {"usage": 0.5},
            "random": steered | {"usage": 0.7},
            "gate_aligned": steered | {"usage": 0.25},
        },
        "claims": [{"claim": f"claim {number}", "holds": held} for number, held in enumerate(holds)],
        "sae": {"explained_variance": 0.88, "l0": 16.0, "latents": 768, "gate_agreement": 0.97, "dead_fraction": 0.01},
        "seconds": {"train": 100.0, "sae": 23.4},
        "peak_memory_bytes": 3 * 2**29,
    }


def test_six_lines_say_what_was_found() -> None:
    assert list_headlines(made_summary(0.94, (True, False, None, False))) == [
        "model: accuracy 90.0% with 80.0% of layer 4's gates open; the dense model: 94.0%",
        "class steering, alpha 2.5: accuracy 91.3% with 50.0% open; change -0.40 to +1.25 points; classes saved: 3",
        "strategies that leave fewer open at their own choice: gate_aligned 25.0%; 1 leave more",
        "claims: 1 of 3 hold; the first that does not: claim 1",
        "autoencoder: 88.0% of the variance by 16 of 768 latents, 97.0% of the gates agree, "
        "1.0% of the latents are dead",
        "took 123 s (train 100 s, sae 23 s) and 1.5 GiB of memory",
    ]


def test_what_is_missing_is_not_said() -> None:
    summary: dict[str, Any] = made_summary(None, (True, True)) | {"dense_accuracy": None}
    del summary["steering"]["gate_aligned"]
    model, _, strategies, claims, *_ = list_headlines(summary)
    assert model == "model: accuracy 90.0% with 80.0% of layer 4's gates open"
    assert strategies == "strategies that leave fewer open at their own choice: none; 1 leave more"
    assert claims == "claims: 2 of 2 hold"
    as_much = summary["steering"] | {"random": summary["steering"]["class"]}
    assert list_headlines(summary | {"steering": as_much})[2].endswith("none; 0 leave more")
    text = "at equal usage, mean_difference is less accurate than class steering"
    with_direction = summary | {"claims": [*summary["claims"], {"claim": text, "holds": False}]}
    assert list_headlines(with_direction)[3] == "claims: 2 of 2 hold; on what the autoencoder adds, 0 of 1 hold"
    text = "at the usage of class steering, the best fixed head subsets are less accurate"
    with_subsets = summary | {"claims": [*summary["claims"], {"claim": text, "holds": True}]}
    assert list_headlines(with_subsets)[3].endswith("; on what steering adds to plain pruning, 1 of 1 hold")
    del summary["steering"]["class"], summary["claims"]  # neither is there if the strategy `class` is not asked for
    _, steering, *rest = list_headlines(summary)
    assert steering.startswith("random steering, alpha 2.5: accuracy 91.3% with 70.0% open")
    assert not any(line.startswith("claims") for line in rest)
