"""From a run's directory to answers for image files: what `headsteer predict` prints, as a table or as JSON.

Only steering needs the run's data: strategies choose latents on the training images.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from headsteer_jax.books import is_done
from headsteer_jax.config.schema import Config
from headsteer_jax.data.image_files import ImageFile, read_images
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.model.gates import SUBLAYERS
from headsteer_jax.runs import (
    check_alpha,
    check_done,
    load_run_dataset,
    read_config,
    read_data_record,
    read_latent_classes,
)
from headsteer_jax.runtime.files import Workdir
from headsteer_jax.sae.store import RunData, read_autoencoders
from headsteer_jax.stages import STAGES
from headsteer_jax.steer.answers import (
    IMAGES_AT_ONCE,
    Answers,
    Predict,
    Predictions,
    find_steering_rule,
    make_predict,
    parse_steering,
)
from headsteer_jax.train.loop import load_trained

COMMAND = "headsteer predict"
LATENTS, CLASSES = 5, 3  # the strongest latents of an image, and the classes that name each
SHOWN_LATENTS = 3  # in the table


class Request(NamedTuple):
    """What is asked of a run beside its answers."""

    steer: str | None = None  # STRATEGY or STRATEGY:CLASS
    alpha: float | None = None
    data: str | None = None  # the new path of the data, which steering needs


@dataclass(frozen=True)
class RunReader:
    """A run's model, ready to answer for image files."""

    config: Config
    class_names: tuple[str, ...]
    image: tuple[int, int, int]  # height, width and channels of what it takes
    predict: Predict
    latent_classes: np.ndarray  # [F, C'] the classes that name each latent; F is 0 if the stage sae is not done
    request: Request

    @property
    def layers(self) -> dict[int, tuple[str, ...]]:
        """The kinds of gates of each gated layer."""
        kinds = {layer: self.config.gate.kinds_in(layer) for layer in range(self.config.model.depth)}
        return {layer: kinds_in for layer, kinds_in in kinds.items() if kinds_in}


def check_request(workdir: Workdir, request: Request) -> None:
    """Check what is asked against a run's directory, before anything is loaded.

    Raises:
      HeadSteerError: a stage is missing, a strategy or class does not exist, or --steer and --alpha are not together.
    """
    check_alpha(request.steer, request.alpha, ("--steer", "--alpha"))
    if request.data is not None and request.steer is None:
        raise HeadSteerError("--data: leave it out; only --steer reads the run's data")
    config = read_config(workdir)
    check_done(config, workdir, "train", COMMAND)
    if request.steer is not None:
        check_done(config, workdir, "sae", f"{COMMAND} --steer")
        parse_steering(request.steer, tuple(read_data_record(workdir)["classes"]), "--steer")


def load_reader(workdir: Workdir, request: Request) -> RunReader:
    """Load a run for predictions: its model, its first autoencoder if there is one, and what steers it.

    Raises:
      HeadSteerError: the run is damaged, or its data are needed and missing.
    """
    config, recorded = read_config(workdir), read_data_record(workdir)
    class_names = tuple(recorded["classes"])
    trained = load_trained(config, len(class_names), workdir / "train")
    sae, latent_classes, rule = None, np.zeros((0, 0), np.int32), None
    if is_done(workdir, STAGES["sae"]):
        check_done(config, workdir, "sae", COMMAND)
        autoencoders, x_train, _ = read_autoencoders(workdir, trained)
        sae, latent_classes = autoencoders.member(0), read_latent_classes(workdir)
        if request.steer is not None:
            _, dataset = load_run_dataset(config, workdir, request.data, "--data=PATH")
            run = RunData(trained, dataset, autoencoders, x_train)
            rule = find_steering_rule(run, *parse_steering(request.steer, class_names, "--steer"))
    latents = min(LATENTS, len(latent_classes))
    predict = make_predict(trained, sae, latents, rule, request.alpha or 0.0)
    height, width, channels = recorded["image"]
    return RunReader(config, class_names, (height, width, channels), predict, latent_classes, request)


class FileAnswer(NamedTuple):
    """The answer for one image file."""

    path: str
    error: str  # why there is no answer; empty: there is one
    predictions: Predictions  # of one image


def predict_run_files(reader: RunReader, files: Sequence[ImageFile]) -> Iterator[FileAnswer]:
    """Answer for image files, in order; a file that cannot be read gets a line that says why."""
    count = IMAGES_AT_ONCE * jax.local_device_count()
    for begin in range(0, len(files), count):
        chunk = files[begin : begin + count]
        images, errors = read_images(chunk, reader.image)
        predictions = reader.predict(images)
        for place, (file, error) in enumerate(zip(chunk, errors, strict=True)):
            yield FileAnswer(str(file.path), error, _take(predictions, place))


def _take(predictions: Predictions, place: int) -> Predictions:
    """Take the prediction of one image, whose arrays lose their first axis."""

    def gates_of(answers: Predictions | Answers) -> dict[str, np.ndarray]:
        return {kind: g[place] for kind, g in answers.gates.items()}

    p, steered = predictions, predictions.steered
    if steered is not None:
        steered = Answers(steered.label[place], steered.confidence[place], gates_of(steered))
    latents = p.latents[place], p.activations[place]
    return Predictions(p.label[place], p.confidence[place], gates_of(p), *latents, steered)


def to_json(answer: FileAnswer, reader: RunReader) -> dict[str, Any]:
    """Convert an answer to what `headsteer predict --json` prints; docs/how-to/predict.md lists the fields."""
    if answer.error:
        return {"path": answer.path, "error": answer.error}
    p = answer.predictions
    latents = [
        {"latent": int(latent), "activation": round(float(activation), 4), "classes": _name_latent(latent, reader)}
        for latent, activation in zip(p.latents, p.activations, strict=True)
        if activation > 0
    ]
    record = {"path": answer.path, **_describe_answer(p, reader)}
    if len(reader.latent_classes):
        record["latents"] = latents
    if p.steered is not None:
        steering = {"steer": reader.request.steer, "alpha": reader.request.alpha}
        record["steered"] = steering | _describe_answer(p.steered, reader)
    return record


def _describe_answer(answer: Predictions | Answers, reader: RunReader) -> dict[str, Any]:
    """Describe the class, its probability, and what ran in each gated layer, in JSON's types."""
    layers = []
    for layer in reader.layers:
        row: dict[str, Any] = {"layer": layer}
        for kind, open_n in _gates_of_layer(answer.gates, layer, reader).items():
            if kind == "sublayers":
                row |= {name: bool(is_open) for name, is_open in zip(SUBLAYERS, open_n, strict=True)}
            else:
                row["patches" if kind == "tokens" else kind] = np.flatnonzero(open_n).tolist()
        layers.append(row)
    name = reader.class_names[int(answer.label)]
    return {"class": name, "probability": round(float(answer.confidence), 6), "layers": layers}


def _gates_of_layer(gates: Mapping[str, np.ndarray], layer: int, reader: RunReader) -> dict[str, np.ndarray]:
    """Return the gates of one layer by kind, [n] bool each."""
    gate = reader.config.gate
    return {kind: gates[kind][layer - gate.settings(kind).first_layer] for kind in gate.kinds_in(layer)}


def _name_latent(latent: int, reader: RunReader) -> list[str]:
    """Return the classes on which a latent fires most often."""
    return [reader.class_names[label] for label in reader.latent_classes[latent, :CLASSES] if label >= 0]


def table_head(reader: RunReader, width: int) -> str:
    """Return the first line of the table; `width` is that of the paths."""
    gates = f"{_gates_title(reader):<{_gates_width(reader)}}"
    latents = "  strongest latents (their classes)" if len(reader.latent_classes) else ""
    return f"{'image':<{width}}  {'class':<{_class_width(reader)}}  prob.   {gates}{latents}".rstrip()


def table_rows(answer: FileAnswer, reader: RunReader, width: int) -> Iterator[str]:
    """Yield the row of an image and, if it is steered, the row of its steered answer; `width` is that of the paths."""
    p = answer.predictions
    names = [
        f"{latent} ({', '.join(_name_latent(latent, reader))})"
        for latent, activation in zip(p.latents[:SHOWN_LATENTS], p.activations, strict=False)
        if activation > 0
    ]
    yield f"{answer.path:<{width}}  {_format_answer(p, reader)}  {'  '.join(names)}".rstrip()
    if p.steered is not None:
        label = f"  {reader.request.steer}, alpha {reader.request.alpha:g}"
        yield f"{label:<{width}}  {_format_answer(p.steered, reader)}".rstrip()


def _format_answer(answer: Predictions | Answers, reader: RunReader) -> str:
    """Format the class, its probability and the gates as columns of the table."""
    name, gates = reader.class_names[int(answer.label)], _format_gates(answer.gates, reader)
    return f"{name:<{_class_width(reader)}}  {float(answer.confidence):6.1%}  {gates:<{_gates_width(reader)}}"


def _format_gates(gates: Mapping[str, np.ndarray], reader: RunReader) -> str:
    """Format the gates of all layers: the last digits of the heads that ran, a and m, the number of patches."""
    words = []
    for layer in reader.layers:
        parts = []
        for kind, open_n in _gates_of_layer(gates, layer, reader).items():
            marks = [str(n % 10) for n in range(len(open_n))] if kind == "heads" else ["a", "m"]
            if kind == "tokens":
                parts.append(f"{open_n.sum():{len(str(len(open_n)))}}p")
            else:
                parts.append("".join(mark if is_open else "." for mark, is_open in zip(marks, open_n, strict=True)))
        words.append("/".join(parts))
    return " ".join(words)


def _gates_title(reader: RunReader) -> str:
    layers = list(reader.layers)
    names = {"heads": "heads", "sublayers": "attention and mlp", "tokens": "patches"}
    kinds = ", ".join(names[kind] for kind in reader.config.gate.kinds)
    return f"{kinds} that ran, layers {layers[0]} to {layers[-1]}"


def _class_width(reader: RunReader) -> int:
    return max(5, *map(len, reader.class_names))


def _gates_width(reader: RunReader) -> int:
    gate, config = reader.config.gate, reader.config
    counts = {
        "heads": config.model.heads,
        "sublayers": 2,
        "tokens": (config.data.image_size // config.model.patch) ** 2,
    }
    closed: dict[str, np.ndarray] = {
        kind: np.zeros((len(config.layers_with(kind)), counts[kind]), bool) for kind in gate.kinds
    }
    return max(len(_gates_title(reader)), len(_format_gates(closed, reader)))


def path_width(files: Sequence[ImageFile], request: Request) -> int:
    """Return the width of the table's first column."""
    steered = "" if request.steer is None else f"  {request.steer}, alpha {request.alpha:g}"
    return max(5, len(steered), *(len(str(file.path)) for file in files if not file.error))
