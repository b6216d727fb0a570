"""What `headsteer deploy` makes of a run: a specialised, gated or steered model, its card and its speed.

Training images choose what is cut, validation images how much, and the test images are seen once, for the card.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import xarray

from headsteer_jax.analysis.sweep_file import to_arrays
from headsteer_jax.config.schema import Config
from headsteer_jax.data.augment import preprocess
from headsteer_jax.data.dataset import Dataset, Split, gather_images
from headsteer_jax.deploy.card import compare_answers, make_card, render_card, score_answers
from headsteer_jax.deploy.convert import GATE_NAMES, convert_model
from headsteer_jax.deploy.cost import count_macs
from headsteer_jax.deploy.distil import distil_model
from headsteer_jax.deploy.images import Answers, ClassImages, answer_images, collect_gates, select_images
from headsteer_jax.deploy.model import DeployedModel, compute_logits
from headsteer_jax.deploy.proposals import Proposals, join_proposals, propose_open_heads, propose_swept_heads
from headsteer_jax.deploy.specialise import Goal, specialise
from headsteer_jax.deploy.speed import describe_device, measure_batches
from headsteer_jax.deploy.steered import ClassSteering, fold_steering
from headsteer_jax.deploy.store import write_model
from headsteer_jax.model.compute import measure_compute
from headsteer_jax.model.skip import make_skipping_forward
from headsteer_jax.model.skip_choice import can_skip
from headsteer_jax.model.vit import Gating, TrainedModel
from headsteer_jax.runtime.files import write_bytes, write_json, write_text

logger = logging.getLogger(__name__)

SPEED_IMAGES = 64  # test images that are fed to the measured models, again and again


class Sources(NamedTuple):
    """A run's models and data, from which a model is deployed."""

    dense: TrainedModel  # of the control if it was trained, otherwise of the dense phase
    gated: TrainedModel
    dataset: Dataset
    run: str  # its name
    labels: np.ndarray  # of the classes that the classifier keeps, ascending
    data: str  # a hash of the run's data
    sweep: xarray.Dataset | None = None  # of the stage steer, if it is done

    @property
    def config(self) -> Config:
        """The run's config."""
        return self.gated.config

    def convert(self, dynamic: bool) -> DeployedModel:
        """Convert the dense or the gated model for the classes; nothing is cut."""
        trained, image = self.gated if dynamic else self.dense, self.dataset.train.images.shape[1:]
        return convert_model(trained, self.dataset.class_names, self.labels, image, dynamic)


class Built(NamedTuple):
    """A deployed model before it is written."""

    kind: str  # specialised, gated or steered
    model: DeployedModel
    dense: DeployedModel  # for the same classes
    images: ClassImages
    provenance: Mapping[str, Any]  # for the card


def build_specialised(sources: Sources, goal: Goal, distil_steps: int) -> Built:
    """Make a smaller model for the classes, and train it with the dense model as teacher if steps are given."""
    images, config = select_images(sources.dataset, sources.labels), sources.config
    dense = sources.convert(dynamic=False)
    specialised = specialise(dense, images, goal, propose_heads(sources, images), config.seed)
    model, validation, distilled = specialised.model, specialised.validation, False
    if distil_steps:
        trained = distil_model(model, dense, images.train, distil_steps, config)
        answers = answer_images(trained, images.validation, "deploy: validation")
        logger.info(f"deploy: validation accuracy {validation.accuracy:.4f}, distilled {answers.accuracy:.4f}")
        distilled = answers.accuracy >= validation.accuracy
        model, validation = (trained, answers) if distilled else (model, validation)
    provenance = {
        "title": f"{len(sources.labels)} classes of {sources.run}",
        "text": f"A vision transformer cut down to {count_macs(model.config) / count_macs(dense.config):.0%} of the "
        "dense model's multiply-accumulates, for these classes only.",
        "run": sources.run, "what": "specialised",
        "budget": goal.budget, "max_loss": None if goal.budget else goal.max_loss,
        "distil_steps": distil_steps if distilled else 0,
        "proposals": ["gates"] if sources.sweep is None else ["gates", "sweep"],
        "validation": compare_answers(validation, specialised.dense_validation),
    }  # fmt: skip
    return Built("specialised", model, dense, images, provenance)


def build_dynamic(
    sources: Sources, steering: ClassSteering | None, strategy: str, alpha: float, towards: Sequence[str]
) -> Built:
    """Make a gated model, with a steering folded into the biases of its gates if there is one.

    Args:
      strategy, alpha, towards: of the steering, for the card: `towards` names the classes that it was made for.
    """
    images, model = select_images(sources.dataset, sources.labels), sources.convert(dynamic=True)
    text = "A vision transformer whose gates decide for every image what runs; what they close is multiplied by 0."
    if steering is not None:
        model = fold_steering(model, sources.config, steering, alpha)
        goal = f"towards {', '.join(towards)}" if len(towards) < len(sources.dataset.class_names) else "for all classes"
        text += f" Its gates are steered {goal} by the strategy {strategy} with alpha {alpha:g}."
    kind = "gated" if steering is None else "steered"
    dense = sources.convert(dynamic=False)
    provenance = {
        "title": f"{len(sources.labels)} classes of {sources.run}, {kind}", "text": text, "run": sources.run,
        "what": kind, "strategy": strategy or None, "alpha": None if steering is None else alpha,
        "steered_towards": None if steering is None else list(towards),
    }  # fmt: skip
    return Built(kind, model, dense, images, provenance)


def propose_heads(sources: Sources, images: ClassImages) -> Proposals:
    """Make the function that proposes heads of a layer by all that the run knows of the classes."""
    config = sources.config
    proposals = propose_open_heads(sources.gated, images, sources.labels, config.seed)
    if sources.sweep is None:
        return proposals
    return join_proposals(proposals, propose_swept_heads(config, to_arrays(sources.sweep), sources.labels))


def write_deployed(
    built: Built,
    sources: Sources,
    directory: Path,
    compared: Mapping[str, DeployedModel],
    write_formats: Callable[[DeployedModel, Path], None],
    draw_speed: Callable[[Mapping[str, Any]], bytes],
) -> None:
    """Measure a model on the test images and write it, its card and its speed into a directory.

    Args:
      compared: other deployed models of the same classes, by name, which are measured as well.
      write_formats: writes the files for other programs.
      draw_speed: draws speed.png from the content of speed.json.
    """
    write_model(directory, built.model)
    write_formats(built.model, directory)
    answers, dense = (answer_images(model, built.images.test, "deploy: test") for model in (built.model, built.dense))
    card = make_card(built.model, built.dense, {"test": compare_answers(answers, dense)}, built.provenance)
    card["data"] = sources.data
    card["share_of_macs"] = measure_share(built.model, sources, built.images.test)
    speed = compare_speeds(built, sources, compared, {built.kind: answers, "dense": dense})
    write_json(directory / "card.json", card)
    write_json(directory / "speed.json", speed)
    write_bytes(directory / "speed.png", draw_speed(speed))
    files = sorted({entry.name for entry in directory.iterdir()} | {"card.md"})
    write_text(directory / "card.md", render_card(card, speed, files))


def compare_speeds(
    built: Built, sources: Sources, compared: Mapping[str, DeployedModel], known: Mapping[str, Answers]
) -> dict[str, Any]:
    """Measure accuracy, multiply-accumulates and images a second of the models of a run and of the deployed one.

    Args:
      compared: other deployed models of the same classes, by name.
      known: the answers on the test images that are known already, by model.

    Returns:
      The content of speed.json, in JSON's types.
    """
    test, gated = built.images.test, sources.convert(dynamic=True)
    models = {"dense": built.dense, "gated, masked": gated, built.kind: built.model} | dict(compared)
    functions: dict[str, Callable[[jax.Array], Any]] = {
        "dense": make_vit_function(sources.dense, sources.labels, "dense"),
        "gated, masked": make_vit_function(sources.gated, sources.labels, "thresholded"),
    }
    functions |= {name: make_deployed_function(model) for name, model in models.items() if name not in functions}
    answers, shares = dict(known), dict[str, float]()
    for name, model in models.items():
        if name not in answers:
            answers[name] = answer_images(model, test, f"deploy: {name}")
        shares[name] = measure_share(model, sources, test)
    if can_skip(sources.config, jax.device_count()):  # which changes neither the answers nor what is counted
        masked = {"gated, skipping": "gated, masked"} | (
            {"steered, skipping": "steered"} if "steered" in models else {}
        )
        for name, other in masked.items():
            functions[name] = make_skipping_function(take_over_gates(sources.gated, models[other]), sources.labels)
            answers[name], shares[name] = answers[other], shares[other]
    images = gather_images(test.images, np.arange(min(SPEED_IMAGES, len(test.labels))))
    speeds = measure_batches(functions, images)
    rows = [
        {"what": name, "share_of_macs": shares[name], "images_per_second": speeds[name], **score_answers(answers[name])}
        for name in functions
    ]
    return {"device": describe_device(), "deployed": built.kind, "rows": rows}


def measure_share(model: DeployedModel, sources: Sources, split: Split) -> float:
    """Measure a model's multiply-accumulates on images, in the mean, as a share of the dense model's."""
    if model.config.gate is None:
        return count_macs(model.config) / count_macs(sources.convert(dynamic=False).config)
    gates = collect_gates(model, split)
    return float(measure_compute(sources.config, len(sources.labels), gates)["share"])


def restrict_classifier(trained: TrainedModel, labels: Sequence[int] | np.ndarray) -> TrainedModel:
    """Restrict a model's classifier to some classes."""
    tree = trained.params["params"]
    head = {"kernel": tree["head"]["kernel"][:, labels], "bias": tree["head"]["bias"][labels]}
    return TrainedModel(trained.config, trained.model.clone(classes=len(labels)), {"params": tree | {"head": head}})


def make_vit_function(trained: TrainedModel, labels: Sequence[int] | np.ndarray, gating: Gating) -> Any:
    """Make the function from uint8 images to logits [B, C] that evaluation runs, with some classes' classifier."""
    config, model, params = restrict_classifier(trained, labels)
    run = jax.jit(lambda params, images: model.apply(params, preprocess(images, config.data), gating=gating)[0])
    return lambda images: run(params, images)


def take_over_gates(trained: TrainedModel, deployed: DeployedModel) -> TrainedModel:
    """Give a run's gated model the biases of the gates of a model that was deployed from it."""
    tree = dict(trained.params["params"])
    for layer, layer_params in enumerate(deployed.params["layers"]):
        block = dict(tree[f"layers_{layer}"])
        for kind, gate in layer_params["gates"].items():
            name = GATE_NAMES[kind]
            block[name] = block[name] | {"linear": block[name]["linear"] | {"bias": gate["bias"]}}
        tree[f"layers_{layer}"] = block
    return TrainedModel(trained.config, trained.model, {"params": tree})


def make_skipping_function(trained: TrainedModel, labels: Sequence[int] | np.ndarray) -> Any:
    """Make the function from uint8 images to logits [B, C] that leaves out what the gates drop."""
    config, model, params = restrict_classifier(trained, labels)
    forward, prepare = make_skipping_forward(model), jax.jit(lambda images: preprocess(images, config.data))
    return lambda images: forward(params, prepare(images))[0]


def make_deployed_function(model: DeployedModel) -> Any:
    """Make the function from uint8 images to logits [B, C] of a deployed model."""
    params = jax.device_put(model.params)
    run = jax.jit(lambda params, images: compute_logits(model.config, params, images))
    return lambda images: run(params, images)
