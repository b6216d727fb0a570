"""A finished run in Python: load it, sweep any strategy over it.

run = load_run("runs/double_digits")
sweep = run.sweep({"class": "class", "mine": my_strategy}, alphas=np.linspace(-4, 16, 401))
sweep.accuracy.sel(named_by="true").plot.line(x="alpha")
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray
from etils.epath import Path
from pydantic import ValidationError

from headsteer_jax.analysis.summary import summarise
from headsteer_jax.analysis.sweep_file import to_dataset
from headsteer_jax.books import explain_staleness
from headsteer_jax.config.files import first_fault
from headsteer_jax.config.schema import Config
from headsteer_jax.data.dataset import Dataset
from headsteer_jax.data.sources import load_dataset
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.model.vit import ViT
from headsteer_jax.sae.autoencoder import SAEWeights, Scaling
from headsteer_jax.stages import autoencoders
from headsteer_jax.steer.strategies import ClassStrategy, Strategy, find_strategy, per_class_strategy
from headsteer_jax.steer.sweep import Arrays, check_strategies_and_classes, check_validation, run_sweep
from headsteer_jax.steer.tally import StepFunction
from headsteer_jax.train.loop import load_trained


@dataclass(frozen=True)
class Run:
    """What the stages train and sae made, in memory."""

    config: Config
    dataset: Dataset
    model: ViT
    params: Any
    saes: SAEWeights  # leading axis S
    scaling: Scaling
    x_train: np.ndarray  # [N, D] residuals of the training split

    def sweep(self, strategies: "Strategies", **steer: Any) -> xarray.Dataset:
        """Steer validation and test with some strategies.

        Args:
          strategies: names of ours, or `module:function`; or names of your own choice -> one of those, or a function
            `(latent statistics, class) -> latents, weights`. A random strategy under two names is drawn twice.
          steer: fields of config.steer to change, for instance `alphas`.

        Returns:
          The dataset of sweep.nc (docs/outputs.md), with `accuracy` and `usage` on test.

        Raises:
          HeadSteerError: a field, strategy or class that is not right.
        """
        config, arrays, steps = self._swept(strategies, steer)
        return to_dataset(arrays | summarise(arrays, config, steps)[1])

    def exact(self, choose: "str | ClassStrategy", split: str = "test", **steer: Any) -> StepFunction:
        """Accuracy and usage as exact functions of alpha on a split, over all autoencoder seeds, steered by label.

        Raises:
          HeadSteerError: as `sweep`; or alpha is not exact for this config.
        """
        *_, steps = self._swept({"asked": choose}, steer | {"alphas": (1.0,)})
        if not steps:
            raise HeadSteerError(
                "alpha is exact for steer.mode = 'add', form = 'delta', target = 'policy', a gate without LayerNorm, "
                "and a layer whose gate patterns fit a table"
            )
        if split not in steps:
            raise HeadSteerError(f"there is no split {split!r} to steer; allowed are {', '.join(steps)}")
        return steps[split]["asked"]

    def _swept(
        self, strategies: "Strategies", steer: Mapping[str, Any]
    ) -> tuple[Config, Arrays, dict[str, dict[str, StepFunction]]]:
        """The config that it was made with, the arrays and the steps."""
        if isinstance(strategies, str):
            strategies = [strategies]
        named = strategies if isinstance(strategies, Mapping) else {name: name for name in strategies}
        chosen = {name: _strategy(choose, name) for name, choose in named.items()}
        if not chosen:
            raise HeadSteerError("no strategy to sweep; give at least one")
        config = self.config.model_dump()
        config["steer"] |= {name: _tuples(value) for name, value in steer.items()} | {"strategies": ("class",)}
        try:
            checked = Config.model_validate(config)
        except ValidationError as error:
            raise HeadSteerError(first_fault(error)) from None
        check_strategies_and_classes(checked, self.dataset.class_names)
        check_validation(self.dataset.validation, checked, self.dataset.class_names)
        made = self.dataset, self.model, self.params, self.saes, self.scaling, self.x_train
        return checked, *run_sweep(checked, *made, chosen)


Strategies = str | Sequence[str] | Mapping[str, str | ClassStrategy]


def _strategy(choose: "str | Callable[..., Any]", name: str) -> Strategy:
    return find_strategy(choose) if isinstance(choose, str) else per_class_strategy(choose, name)


def _tuples(value: Any) -> Any:
    """Arrays and lists as the config has them."""
    return tuple(np.asarray(value).tolist()) if isinstance(value, (list, np.ndarray)) else value


def load_run(workdir: str | Path) -> Run:
    """A run whose stages train and sae are done, with the config that its last command had.

    Raises:
      HeadSteerError: a stage is missing or damaged, or the data are no longer there.
    """
    workdir = Path(workdir)
    path = workdir / "config.json"
    if not path.exists():
        raise HeadSteerError(f"{path}: there is none, so no run was started here; run.py --workdir={workdir} makes one")
    try:
        config = Config.model_validate_json(path.read_text())
    except ValidationError as error:
        raise HeadSteerError(f"{path}: damaged, or of another version: {first_fault(error)}") from None
    for stage in ("train", "sae"):
        if not (workdir / stage / "done.json").exists():
            raise HeadSteerError(f"{workdir}: its stage {stage} is not done; run.py --stages=train,sae makes it")
        if reason := explain_staleness(config, workdir, stage):
            raise HeadSteerError(f"{workdir / stage}: not of this run's config.json ({reason}); run.py makes it again")
    dataset = load_dataset(config.data, config.seed)
    model, params = load_trained(config, dataset, workdir / "train")
    saes, scaling, x_train, _ = autoencoders(config, params, workdir)
    return Run(config, dataset, model, params, saes, scaling, x_train)
