"""The programs of every stage, in the order of a run; to add a program, add it to its stage's list."""

from collections.abc import Callable, Iterator

from headsteer_jax.compilation.planned import Experiment, PlannedProgram
from headsteer_jax.compilation.sae_programs import (
    list_autoencoder_programs,
    list_grid_programs,
    list_layer_autoencoder_programs,
)
from headsteer_jax.compilation.steer_programs import list_layer_programs, list_sweep_programs
from headsteer_jax.compilation.train_programs import (
    list_evaluation_programs,
    list_front_programs,
    list_training_programs,
)

PROGRAMS: dict[str, tuple[Callable[[Experiment], Iterator[PlannedProgram]], ...]] = {
    "train": (list_training_programs, list_evaluation_programs),
    "sae": (list_autoencoder_programs,),
    "grid": (list_grid_programs,),
    "steer": (list_sweep_programs,),
    "layers": (list_layer_autoencoder_programs, list_layer_programs),
    "front": (list_front_programs,),
}


def list_programs(experiment: Experiment, stages: tuple[str, ...]) -> Iterator[PlannedProgram]:
    """List the programs of some stages, in the order of a run."""
    for name, makers in PROGRAMS.items():
        for list_some in makers if name in stages else ():
            yield from list_some(experiment)
