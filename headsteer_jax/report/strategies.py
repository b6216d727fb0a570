"""What each strategy does, in a sentence for the pages."""

from collections.abc import Sequence

SENTENCES = {
    "class": "changes the latents that fire most often on images of the class",
    "global": "changes the latents that fire most often on all images",
    "random": "changes latents drawn uniformly from those that fire",
    "matched_random": (
        "changes other latents that fire as often as those of “class” and move the residual as far: the strictest "
        "control of latents"
    ),
    "gate_aligned": (
        "changes those latents of the class whose decoder rows push the gate towards fewer heads at the same accuracy"
    ),
    "superclass": "changes the latents that fire most often on images of the class and of the classes related to it",
    "matched_superclass": (
        "changes other latents that fire as often as those of “superclass” and move the residual as far: its control"
    ),
    "mean_difference": (
        "adds the class's mean residual less that of the other classes, as far as “class” moves the residual; it needs "
        "no autoencoder"
    ),
    "probe": (
        "adds the direction in which a linear classifier sees more of the class, as far as “class” moves the residual; "
        "it needs no autoencoder"
    ),
    "random_direction": (
        "adds a direction drawn for each class, as far as “class” moves the residual: the control of “mean difference” "
        "and “probe”"
    ),
    "gate_bias": (
        "adds the shortest direction that pushes the gate as “gate aligned” wants it pushed; it needs no autoencoder"
    ),
    "random_bias": (
        "adds a direction as long as that of “gate bias”, drawn for each class within what the gates see: its control"
    ),
    "global_bias": "adds one direction to all images, fitted as that of “gate bias”, and needs no label",
    "image_latents": "changes the image's own strongest latents, and needs no label",
    "image_random": (
        "adds a direction drawn for each image that moves the residual as far as “image latents” does: its control"
    ),
    "guessed_bias": (
        "adds the directions of “gate bias”, mixed by a linear classifier's guess of the class; it needs no label"
    ),
    "guessed_difference": (
        "adds the directions of “mean difference”, as long as they are there, mixed by a linear classifier's guess of "
        "the class; it needs neither an autoencoder nor a label"
    ),
}


def describe_strategies(names: Sequence[str]) -> list[tuple[str, str]]:
    """Describe each strategy of a run: its name in words, and what it does."""
    return [(name.replace("_", " "), SENTENCES.get(name, "is the user's own")) for name in names]
