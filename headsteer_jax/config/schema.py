"""The config of an experiment: every setting that it depends on, documented, typed and checked at the start.

A config file defines `get_config() -> Config`. The sections are in the order of the data flow. They are frozen and
hashable, so that a section can be a static argument of a jitted function. A field's docstring is its help text.
"""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from headsteer_jax.config.paths import has_known_scheme, is_unicode

Fraction = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, le=1)]  # a fraction that cannot be 0
Finite = Annotated[float, Field(allow_inf_nan=False)]
Threshold = Annotated[float, Field(gt=0, lt=1)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]  # JAX's keys take 32 bits: 2^32 + 1 would draw what 1 draws

GateKind = Literal["heads", "sublayers", "tokens"]
GATE_KINDS: tuple[GateKind, ...] = ("heads", "sublayers", "tokens")

# strategies that look at the answers under every gate pattern
TABLE_STRATEGIES = ("gate_aligned", "gate_bias", "random_bias", "global_bias", "guessed_bias")
MOST_HEADS = 12  # the most heads of a layer for which all 2^H head subsets are tried
PIXEL_UNITS = "because pixels go from 0 to 1: divide numbers in units of 255 by 255"
# the libraries whose autoencoders can be imported, with the forms of sae.pretrained
IMPORTED = {
    "saelens": "saelens:DIR",
    "overcomplete": "overcomplete:FILE.safetensors",
    "dictionary_learning": "dictionary_learning:DIR",
    "sparsify": "sparsify:DIR",
}
PATTERN_BITS = 30  # a gate pattern is an int32 with one bit for each gate of a layer that reads its CLS residual

SIZES = {"Ti": (12, 192, 3), "S": (12, 384, 6), "B": (12, 768, 12)}  # depth, width, heads [ViT, DeiT]


class Section(BaseModel):
    """One group of fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class DataConfig(Section):
    """The images, and how they reach the model."""

    source: str = "double_digits"
    """The kind of dataset, a name in headsteer_jax.data.sources.SOURCES. double_digits: two handwritten digits on a
    canvas, from scikit-learn. tfds: a dataset of TensorFlow Datasets. folder: images in PATH/SPLIT/CLASS/. npz: one
    file with train_images, train_labels, test_images, test_labels and, optionally, class_names."""
    seed: Annotated[int, Field(ge=-1, le=2**32 - 1)] = -1
    """The seed that draws the splits and their images, if it differs from the experiment's: models of several seeds can
    then have the same data, as those of a study have. -1 means the experiment's seed."""
    name: str = ""
    """The name of a TensorFlow dataset, such as cifar100. Only the source tfds needs it."""
    path: str = ""
    """The location of the data: the directory of the source folder, the file of the source npz, or the directory that
    holds the prepared dataset of the source tfds. If it is empty, tfds looks in its own default directory. A
    leading ~ means the home directory."""
    splits: tuple[str, ...] = ()
    """The names of the published splits: of train and test, if validation is cut from train; of train, validation and
    test; or of one split from which all three are cut. For the source folder they are directories in PATH, and `.` is
    PATH itself. If it is empty, the usual names are used: train; val, validation, valid or dev; test. A validation
    split stands in for a test split that is missing or has no labels, and a new one is then cut from train."""
    image_size: PositiveInt = 20
    """The side in pixels of the square image that the model sees. Images of other sizes are cropped and resized."""
    channels: Literal[1, 3] = 1
    """The number of colour channels: 1 for grey images, 3 for colour images."""
    mean: tuple[Finite, ...] = (0.0,)
    """The mean of each channel, which is subtracted from every pixel. Pixels go from 0 to 1."""
    std: tuple[PositiveFloat, ...] = (1.0,)
    """The standard deviation of each channel, by which every pixel is divided. Pixels go from 0 to 1."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """The share of each class's training images that becomes the validation split, before anything is fitted. For
    double_digits it is the share of the source digits. It has no effect if the dataset has a validation split."""
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """The share of each class's images that becomes the test split, drawn with the seed, if splits names one split.
    Otherwise it has no effect."""
    train_per_class: NonNegativeInt = 0
    """The largest number of training images of each class. They are drawn with the seed, and 0 takes all. For
    double_digits it is the number of canvases that are composed for each class, and 0 means 400."""
    eval_per_class: NonNegativeInt = 0
    """The largest number of images of each class in the validation split and in the test split. They are drawn with
    the seed, and 0 takes all. For double_digits 0 means 100."""
    crop_padding: NonNegativeInt = 2
    """The largest shift of a training image in pixels, each way: a random crop of the padded image."""
    crop_fill: Literal["black", "mirror"] = "black"
    """What crop_padding pads an image with: black, or the image mirrored at its edges. With gates of tokens choose
    mirror: gates drop black patches, which other images do not have, so those cost more than training images do."""
    crop_scale: Share = 1.0
    """The smallest share of a training image's area that a random square crop keeps, before it is resized to
    image_size. 1 switches this crop off."""
    flip: bool = False
    """Mirror training images left and right with probability 1/2."""
    related: tuple[str, ...] = ()
    """Groups of classes that are known to be alike, each in the form group=class|class|..., with a backslash before a
    | or = that belongs to a name. The report compares the pairs of classes within a group with all other pairs. If it
    is empty, the dataset's own groups are used: double_digits relates classes with a common digit, and tfds classes
    with the same coarse_label."""
    rand_augment_ops: NonNegativeInt = 0
    """The number of RandAugment operations (arXiv:1909.13719) on each training image. 0 switches them off; 2 is usual
    for images of 224 pixels."""
    rand_augment_magnitude: Annotated[float, Field(ge=0, le=10)] = 9.0
    """The strength of RandAugment's operations, from 0 to 10."""


class ModelConfig(Section):
    """The vision transformer [ViT]: pre-norm blocks and a CLS token. ModelConfig.of_size gives the usual shapes."""

    patch: PositiveInt = 4
    """The side of a patch in pixels, which must divide data.image_size. There are (image_size / patch)^2 patches, and
    T tokens with the CLS token and the registers."""
    depth: PositiveInt = 4
    """The number of blocks, L."""
    width: PositiveInt = 96
    """The width of the residual stream, D."""
    heads: PositiveInt = 6
    """The number of attention heads in each block, H, which must divide the width."""
    mlp_ratio: PositiveFloat = 4.0
    """The hidden width of a block's MLP, divided by D."""
    layer_norm_epsilon: PositiveFloat = 1e-6
    """The epsilon of LayerNorm. It is 1e-6 in published vision transformers; PyTorch's default is 1e-5."""
    gelu: Literal["exact", "tanh"] = "exact"
    """The form of GELU: exact (by erf) for the checkpoints of timm and Hugging Face, tanh for the original JAX
    checkpoints."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The type in which training computes matrix products. Parameters, LayerNorm, softmax, gates and logits stay
    float32, and so does everything in evaluation and steering, where answers are compared."""
    registers: NonNegativeInt = 0
    """The number of register tokens between CLS and the patches, which have no positions (arXiv:2309.16588). DINOv2's
    `reg4` files have 4. The distillation token of DeiT's distilled files counts as one."""
    pretrained: str = ""
    """The file of a pretrained backbone, or the directory that holds it. It is a .safetensors, .pth, .pt, .bin, .ckpt
    or .npz file, whole or in shards, with the names of timm, DINOv2, MAE, Hugging Face's ViTModel, DeiTModel and
    Dinov2Model, torchvision or google-research, with any prefix. hf://owner/model downloads it from the
    Hugging Face hub, and hf://owner/model/FILE another file of it. A config.json beside the file is compared with this
    section. A PyTorch file needs the extra `torch`, and a download needs the extra `hub`. If it is empty, the model is
    trained from scratch."""
    pretrained_head: bool = False
    """Keep the pretrained file's classifier, which must have the dataset's classes in the same order. Otherwise the
    classifier is trained from scratch."""

    @classmethod
    def of_size(cls, size: Literal["Ti", "S", "B"], **fields: Any) -> Self:
        """Return the model of a usual size (12 layers; width 192, 384 or 768; 3, 6 or 12 heads) with these fields."""
        depth, width, heads = SIZES[size]
        return cls(depth=depth, width=width, heads=heads, **fields)


class SublayerGateConfig(Section):
    """The gates that switch a block's attention and its MLP on and off [AdaViT]; they read the CLS residual."""

    first_layer: NonNegativeInt = 1
    """The first layer with gates for its sublayers; the layers before it always run both. In [AdaViT] that is layer 0
    only."""
    bias: Finite = 2.0
    """The initial bias of these gates; see gate.bias."""
    temperature: PositiveFloat = 1.0
    """The temperature of these gates; see gate.temperature."""
    threshold: Threshold = 0.5
    """The probability sigmoid(m) above which a sublayer runs; see gate.threshold."""
    target: Share = 0.75
    """The share of sublayers that the usage loss aims at, if gate.budget is 0."""


class TokenGateConfig(Section):
    """The gates that choose the patches which take part in a block [AdaViT]; each reads its own patch's residual.

    CLS and the registers are always kept. A dropped patch neither attends, nor is attended to, nor passes the MLP in
    that block. It keeps its residual, and a later block may take it up again.
    """

    first_layer: NonNegativeInt = 0
    """The first layer with gates for its patches; the layers before it keep all of them."""
    bias: Finite = 2.0
    """The initial bias of these gates; see gate.bias."""
    temperature: PositiveFloat = 1.0
    """The temperature of these gates; see gate.temperature."""
    threshold: Threshold = 0.5
    """The probability sigmoid(m) above which a patch is kept; see gate.threshold. [AdaViT]'s code uses 0.6."""
    target: Share = 0.75
    """The share of patches that the usage loss aims at, if gate.budget is 0."""
    loss: Literal["", "absolute", "squared"] = ""
    """The form of the usage loss of patches, if gate.budget is 0; see gate.loss, which counts if this is empty.
    [AdaViT]'s code takes the square for patches and the absolute value for the other kinds."""
    normalise: bool = True
    """Let these gates read the block's first LayerNorm of each patch, as in [AdaViT], and not the residual itself."""


class GateSettings(NamedTuple):
    """The settings that every kind of gate has."""

    first_layer: int
    bias: float
    temperature: float
    threshold: float
    target: float


class GateConfig(Section):
    """The decision networks in each gated layer, and the loss that limits what they let run [AdaViT].

    The fields first_layer, bias, temperature, threshold and target are those of the heads' gates. The other kinds have
    sections of their own.
    """

    kinds: tuple[GateKind, ...] = ("heads",)
    """The parts of a layer that gates switch on and off for each image. heads: the attention heads, as in [LH26].
    sublayers: attention as a whole, and the MLP. tokens: the patches. [AdaViT] has all three."""
    first_layer: PositiveInt = 1
    """The first layer with gates for its heads; the layers before it keep all their heads. In [AdaViT] that is layer 0
    only."""
    layer_norm: bool = False
    """Normalise the CLS residual before the gate reads it. Without this the gate logit is affine in the steering
    strength."""
    dropped: Literal["zero", "identity", "slice"] = "zero"
    """The effect of a dropped head. zero: its output is 0. identity: each token attends to itself, so that its value
    passes unchanged. slice: its output is 0, and so is its share of the MLP's input, which is D / H wide, as in
    [AdaViT]'s code."""
    bias: Finite = 2.0
    """The initial bias of the gates. A positive bias opens them, so that pretrained features survive when the gates
    are switched on."""
    temperature: PositiveFloat = 1.0
    """The temperature tau in sigmoid((m + noise) / tau), whose gradient the straight-through estimator uses.
    [AdaViT]'s code uses 5."""
    threshold: Threshold = 0.5
    """The probability sigmoid(m) above which a head is kept, as in [AdaViT]'s code. A threshold t moves the gate's bias
    by -log(t / (1 - t)): the gate logit m is counted from there, so that a gate is open where m > 0."""
    noise: NonNegativeFloat = 1.0
    """The scale of the gates' logistic noise in training, before annealing. With 0 the gates are thresholded from the
    start."""
    target: Share = 0.75
    """The share of heads that the usage loss aims at, if gate.budget is 0."""
    budget: Fraction = 0.0
    """The share of the dense model's multiply-accumulates that the usage loss aims at, with all kinds of gates
    together. With 0 each kind of gate has its own target instead."""
    scope: Literal["layer", "mean"] = "layer"
    """The usage that the target is for. layer: the usage of every gated layer. mean: the mean usage of all gated
    layers."""
    loss: Literal["absolute", "squared"] = "absolute"
    """The form of the usage loss. absolute: |usage - target|, as in [AdaViT]'s code. squared: its square, as in
    [AdaViT]'s paper. With gate.budget it is the form of the distance to the budget."""
    running_only: bool = False
    """Take the usage of heads, for its target, over those blocks of each image whose attention or MLP runs, as in
    [AdaViT]'s code, and not over all blocks. It matters only if gate.kinds has heads and sublayers."""
    weight: NonNegativeFloat = 2.0
    """The weight of the usage loss."""
    learning_rate_scale: PositiveFloat = 1.0
    """The learning rate of the gates, divided by that of the other parameters. A value above 1 helps if the backbone is
    pretrained and learns slowly: a gate moves in proportion to its input, and early residuals are small."""
    anneal: Fraction = 0.62
    """The share of the gated phase, at its start, in which the noise falls linearly to 0 and the target, or the budget,
    falls from 1 to its value. The remaining steps train thresholded gates, because sampled and thresholded gates are
    two different models."""
    teacher_logits: NonNegativeFloat = 0.0
    """The weight of the distance to the logits of the dense phase's model, the teacher of the gated phase:
    T^2 KL(teacher || model) at the temperature T. The teacher sees the same augmented and mixed images; label smoothing
    does not concern it. 0 switches it off."""
    teacher_temperature: PositiveFloat = 5.0
    """The temperature at which the teacher's and the gated model's logits are compared. [AdaViT]'s code has 5."""
    teacher_hidden: NonNegativeFloat = 0.0
    """The weight of the mean squared difference to the teacher's CLS residual after the last layer, both standardised
    to mean 0 and variance 1. 0 switches it off."""
    sublayers: SublayerGateConfig = SublayerGateConfig()
    tokens: TokenGateConfig = TokenGateConfig()

    def settings(self, kind: GateKind) -> GateSettings:
        """Return the settings of one kind of gate."""
        section = self if kind == "heads" else getattr(self, kind)
        return GateSettings(*(getattr(section, name) for name in GateSettings._fields))

    def kinds_in(self, layer: int) -> tuple[GateKind, ...]:
        """Return the kinds of gates that a layer has, in the order of GATE_KINDS."""
        return tuple(kind for kind in GATE_KINDS if kind in self.kinds and layer >= self.settings(kind).first_layer)


class PhaseConfig(Section):
    """One training phase: the learning rate rises linearly and then follows a cosine to `final` times its peak."""

    steps: NonNegativeInt
    """The number of optimizer steps. With 0 the phase is left out."""
    learning_rate: PositiveFloat = 1e-3
    """The peak of the phase's learning rate."""
    warmup: Fraction = 0.05
    """The share of the phase's steps in which the learning rate rises from 0 to its peak."""
    final: Fraction = 0.0
    """The learning rate at the end of the phase, divided by its peak."""


class TrainConfig(Section):
    """The vision transformer's training: AdamW on cross-entropy plus the usage loss, first dense, then with gates."""

    batch: PositiveInt = 128
    """The number of images in a training step, B."""
    dense: PhaseConfig = PhaseConfig(steps=1500)
    """The dense phase, in which every head runs."""
    gated: PhaseConfig = PhaseConfig(steps=800)
    """The gated phase, which continues from the end of the dense phase with gates."""
    dense_control: bool = True
    """Also train the dense model further, for as many steps as the gated phase has, so that the gated model can be
    compared with a dense model of the same training length."""
    dense_from: str = ""
    """The workdir of another run whose dense phase is taken over instead of trained, and its dense control too, if that
    was trained as this config says. Data, seed, model and dense phase must be equal, and the gates start anew. Runs
    that differ only in their gates can thus share one dense phase. If it is empty, the dense phase is trained."""
    use: Literal["last", "best"] = "last"
    """The checkpoint of the gated phase that later stages read. last: the one at the end. best: the one with the best
    validation accuracy after annealing."""
    weight_decay: NonNegativeFloat = 0.05
    """The weight decay of AdamW, which applies to matrices only."""
    clip: PositiveFloat = 1.0
    """The largest global norm of the gradient; a larger gradient is scaled down to it."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """The share of each label that is spread evenly over all classes."""
    mixup: NonNegativeFloat = 0.0
    """The alpha of mixup's Beta distribution (arXiv:1710.09412). 0 switches mixup off."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The decay of an exponential moving average of the parameters, which is then evaluated and used instead of them.
    With 0 there is no average."""
    accumulate: PositiveInt = 1
    """The number of parts into which a step's batch is divided to save memory. They are computed one after the other,
    and their gradients are averaged. The result is the gradient of the whole batch, except that each part takes the
    usage loss over its own images."""
    eval_batch: PositiveInt = 1000
    """The number of images in a forward pass of evaluation, in every stage."""
    steps_per_call: PositiveInt = 25
    """The number of steps in one call of the jitted program. Their batches are sent to the devices together, and one
    row of metrics.jsonl holds their means."""
    eval_every: PositiveInt = 250
    """The number of steps between evaluations on the validation split, and between checkpoints. It must be a multiple
    of steps_per_call."""


class SAEAblationConfig(Section):
    """Parts of the autoencoder's training recipe that only an ablation switches off."""

    unit_gradient: bool = True
    """Scale each step's gradient to norm 1 before Adam. Otherwise Adam remembers the first, much larger gradients,
    which slows the next thousand steps."""
    init: Literal["tied", "data", "untied"] = "tied"
    """The initial weights. tied: the decoder's rows are random, and the encoder equals the decoder. data: the
    decoder's rows are training residuals, and the encoder equals the decoder. untied: the encoder is drawn
    independently of the decoder."""
    decoder_norm: Literal["unit", "free"] = "unit"
    """The norm of the decoder's rows. unit: they are scaled to norm 1 after each step, and their gradient loses its
    radial part. free: neither is done."""
    centre: bool = True
    """Subtract the mean over the training split from the residuals. Without it most latents die."""
    scale: bool = True
    """Divide the residuals by one number, so that their mean norm is sqrt(D)."""


class SAEConfig(Section):
    """The sparse autoencoder of the residual that enters one layer."""

    layer: int = -1
    """The layer whose input the autoencoder reads. Negative numbers count from the end; -1, the last layer, is
    [LH26]'s."""
    tokens: Literal["cls", "patches", "all"] = "cls"
    """The tokens whose residuals the autoencoder is trained on: the CLS token, which the gate reads, every patch, or
    both. Steering changes the CLS residual in every case. If the autoencoder reads patches and the layer gates them,
    their gates are steered as well."""
    expansion: PositiveInt = 8
    """The number of latents, F, divided by the width D. In [LH26] it is 8: 384 -> 3072. It has no effect if latents is
    not 0."""
    latents: NonNegativeInt = 0
    """The number of latents, F, for instance if it is not a multiple of the width. With 0 it is expansion times D."""
    activation: Literal["topk", "batch_topk", "jumprelu", "relu"] = "topk"
    """The choice of active latents, which are never negative. topk: the k largest of each residual (arXiv:2406.04093).
    batch_topk: the B k largest of a batch in training, and a threshold afterwards (arXiv:2412.06410). jumprelu: those
    above a threshold that each latent learns (arXiv:2407.14435). relu: the positive ones, with an L1 penalty, as a
    baseline."""
    k: PositiveInt = 32
    """The number of active latents for each residual: exactly for topk, on average for batch_topk, as a target for
    jumprelu. relu does not use it. The abstract of [LH26] has no k; a reader reported 64."""
    prefixes: tuple[Share, ...] = ()
    """The prefixes of a Matryoshka autoencoder (arXiv:2503.17547), as shares of the latents such as 0.0625,0.25. The
    first latents of each prefix must reconstruct the residual by themselves as well. If it is empty, there are
    none."""
    seeds: PositiveInt = 3
    """The number of autoencoders that are trained side by side from different initialisations. Every steering result
    is computed with each of them."""
    epochs: PositiveInt = 100
    """The number of passes over the training split's residuals."""
    batch: PositiveInt = 1024
    """The number of residuals in a training step, which is at most the number of training residuals."""
    learning_rate: PositiveFloat = 4e-4
    """The peak of Adam's learning rate."""
    weight_decay: NonNegativeFloat = 0.0
    """The decoupled weight decay w of the encoder's matrix, as in AdamW: a step sets W_e to (1 - r w) W_e plus Adam's
    step, where r is the step's learning rate, after warm-up and decay. Nothing else decays: decoder rows have norm 1,
    and biases and thresholds are offsets."""
    warmup: Fraction = 0.05
    """The share of all steps in which the learning rate rises from 0 to its peak."""
    decay: Fraction = 0.2
    """The share of all steps, at the end, in which the learning rate falls linearly to 0."""
    k_start: NonNegativeInt = 0
    """The number of active latents at the start of the training, from which it falls linearly to k. With 0 it is k
    throughout. Only topk and batch_topk use it."""
    k_anneal: Fraction = 0.2
    """The share of all steps, at the start, in which the number of active latents falls from k_start to k."""
    aux_k: NonNegativeInt = 0
    """The number of dead latents that reconstruct the residual in the auxiliary loss AuxK. With 0 it is D / 2."""
    aux_weight: NonNegativeFloat = 1 / 32
    """The weight of the auxiliary loss AuxK. 0 switches it off."""
    dead_window: Annotated[float, Field(gt=0, le=1e6)] = 3.0
    """The number of epochs after which a latent that has not fired counts as dead. It may be a fraction of an epoch.
    With sae.views it counts passes over as many residuals as one view has, so that the number of training steps is the
    same for any number of views."""
    dense_frequency: Share = 0.1
    """A latent that fires on more than this share of the training images counts as dense."""
    l1_weight: NonNegativeFloat = 0.05
    """The weight of relu's penalty: the sum of the latents, each times the norm of its decoder row, over sqrt(D)."""
    l0_weight: NonNegativeFloat = 1.0
    """The weight of jumprelu's penalty, (L0 / k - 1)^2."""
    bandwidth: PositiveFloat = 0.5
    """The width of the kernel that estimates the gradient of jumprelu's thresholds, in units of the scaled input."""
    pretrained: str = ""
    """An autoencoder that is imported instead of trained: saelens:DIR, overcomplete:FILE.safetensors,
    dictionary_learning:DIR or sparsify:DIR. Its activation, its k and its number of latents must agree with this
    config, and seeds must be 1. If it is empty, autoencoders are trained."""
    control: bool = True
    """Train one more autoencoder, from the first seed's initialisation on another order of the data. The report
    compares the similarity of different seeds with the similarity of these two."""
    views: PositiveInt = 1
    """The number of versions of each training image whose residuals train the autoencoder: the image itself, and others
    that are augmented. An epoch passes over all of them, so it has this many times the steps. The residuals of each
    view are cached by themselves, so that more views add to those that are there. Everything else, such as the
    statistics of latents, takes the image itself. The stage layers takes one view."""
    view_padding: Annotated[int, Field(ge=-1)] = -1
    """The largest shift of an augmented view in pixels, each way; see data.crop_padding. -1 means data.crop_padding.
    data.crop_fill, data.crop_scale and RandAugment augment views as they do training images."""
    view_flip: Literal["data", "on", "off"] = "data"
    """Mirror augmented views left and right with probability 1/2: on or off. data means data.flip."""
    memory: PositiveInt = 4096
    """The most MiB of residuals that training holds in memory. If there are more, they are read in parts of a third of
    that, in a new random order in each epoch."""
    ablation: SAEAblationConfig = SAEAblationConfig()
    """Parts of the training recipe that can be switched off."""

    @property
    def inference_k(self) -> int | None:
        """Return the k of TopK; None if thresholds decide which latents are active."""
        return self.k if self.activation == "topk" else None


class GridConfig(Section):
    """The stage `grid`: autoencoders of several k and learning rates, trained together as one program."""

    k: tuple[PositiveInt, ...] = ()
    """The numbers of active latents, each of which is combined with every learning rate. If it is empty, they are half
    of sae.k, sae.k, and twice sae.k, except for those above the number of latents."""
    learning_rates: tuple[PositiveFloat, ...] = ()
    """The peaks of the learning rate. If it is empty, sae.learning_rate is the only one."""
    seeds: PositiveInt = 2
    """The number of autoencoders for each combination of k and learning rate."""
    epochs: NonNegativeInt = 0
    """The number of passes over the training split's residuals. With 0 it is sae.epochs."""


class SteerConfig(Section):
    """Steering: the latents that are changed, how they are changed, and by how much."""

    strategies: tuple[str, ...] = ("class", "global", "random", "matched_random", "gate_aligned")
    """The strategies that choose latents or directions: names in headsteer_jax.steer.catalogue.STRATEGIES, or
    `module:function` for a function of your own. It is called with the latents' statistics and the index of a class,
    and returns the latents and their weights, or a direction."""
    latents: PositiveInt = 16
    """The number of latents that a strategy chooses for each class, |S|. [LH26] does not report it."""
    max_frequency: Share = 1.0
    """The largest share of the training images on which a chosen latent may fire. Dense latents are not concepts."""
    pool: PositiveInt = 128
    """The number of each class's most frequent latents from which gate_aligned chooses."""
    price: PositiveFloat = 0.02
    """The accuracy that gate_aligned gives up at alpha 1 to lower a class's usage from 1 to 0. It grows in
    proportion to alpha."""
    evidence: PositiveInt = 200
    """The number of training images of each class that gate_aligned uses in addition to the validation images. Their
    predictions under every gate pattern show which heads the class can spare."""
    mode: Literal["add", "scale", "clamp", "ablate"] = "add"
    """The change of a chosen latent z, where s is its mean activation on the images on which it fires. add:
    z + alpha s. scale: (1 + alpha) z. clamp: alpha s. ablate: (1 - alpha) z, with alpha cut to [0, 1]. Latents stay
    >= 0."""
    patch_mode: Literal["add", "scale", "clamp", "ablate"] = "scale"
    """The change of a chosen latent in the residual of each patch, if the autoencoder reads patches (sae.tokens) and
    their gates are steered; see mode. scale amplifies a concept where it is. add and clamp push all patches of an image
    alike, because a class has the same latents everywhere."""
    form: Literal["delta", "replace"] = "delta"
    """The steered residual x'. delta: x + decode(z') - decode(z), which keeps the autoencoder's error. replace:
    decode(z')."""
    target: Literal["policy", "residual"] = "policy"
    """The reader of the steered residual x'. policy: only the gate reads it, as in [LH26]. residual: the block computes
    on it too."""
    alphas: tuple[Finite, ...] = (-4.0, -2.0, -1.0, -0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
    """The steering strengths of the sweep. 0, the unsteered model, is added if it is missing."""
    wanted_usage: tuple[Fraction, ...] = (0.75, 0.5, 0.25)
    """The usages for which the sweep finds the smallest alpha that reaches them, if alpha can be computed exactly."""
    least_confidence: Fraction = 0.0
    """The least probability of a class that is not known from the label but predicted or guessed. By predicted class,
    an image whose largest probability (softmax) is below it is not steered: the unsteered answer, which is there
    already, stands. guessed_bias steers an image whose guess is below it as global_bias does, and guessed_difference
    does not steer it."""
    guess_classes: NonNegativeInt = 0
    """The number of most probable classes whose directions guessed_bias and guessed_difference mix, by their
    probabilities. With 0 they mix those of all classes."""
    guess_layer: int = 0
    """The layer whose input guessed_bias and guessed_difference guess the class from: at most the steered layer. It is
    counted from 0, or from the end if it is negative. With 0 it is the steered layer itself, because the CLS token that
    enters layer 0 has seen no image."""
    classes: tuple[str, ...] = ()
    """The classes whose images are steered and scored. If it is empty, all classes are used."""
    least_validation: PositiveInt = 5
    """The number of validation images that every steered class must have, because alpha is chosen on them."""
    tolerance: Fraction = 0.01
    """The most accuracy on validation that the chosen alpha may give up."""
    allowed_loss: Fraction = 0.0
    """The most accuracy that steering may cost on test by the claims: the interval of the change must stay above minus
    this. With 0 it is steer.tolerance. A loss that validation allows shows on test as well, with its own chance, so it
    should be larger."""
    saving: Fraction = 0.2
    """A class counts as saved if its usage falls by at least this much and its accuracy does not fall."""
    bootstrap: PositiveInt = 1000
    """The number of resamplings behind each confidence interval."""
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """The level of the confidence intervals."""
    subsets: Annotated[int, Field(ge=64, le=4096)] = 512
    """The number of head subsets, of every size, that the controls try if a layer has more than 12 heads. With up to 12
    heads they try all 2^H."""

    @property
    def claimed_loss(self) -> float:
        """Return the most accuracy that steering may cost on test by the claims."""
        return self.allowed_loss or self.tolerance


class LayersConfig(Section):
    """How steerable each gated layer is: the strategy `class` in every layer by itself, and in all at once."""

    layers: tuple[int, ...] = ()
    """The gated layers that are measured, each with an autoencoder of its own. Negative numbers count from the end. If
    it is empty, all gated layers are measured."""
    epochs: PositiveInt = 20
    """The number of passes over the residuals that train each layer's autoencoder, which has one seed. Everything
    else is as in the section `sae`."""
    alphas: tuple[Finite, ...] = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
    """The steering strengths. Each costs a forward pass of the layers from the steered one on."""
    per_class: NonNegativeInt = 20
    """The largest number of validation images and of test images of each class. With 0 all are used."""


class FrontConfig(Section):
    """The stage `front`: gated models of several budgets, all from the dense phase's end."""

    budgets: tuple[Share, ...] = ()
    """The budgets, as shares of the dense model's multiply-accumulates; see gate.budget. Each trains a gated phase,
    except gate.budget, which is the run's own model and always among them. If it is empty, they are four, spread evenly
    between what these gates cannot switch off and 1."""


class ReportConfig(Section):
    """The contents of the report's pages."""

    top_classes: PositiveInt = 12
    """The number of classes in the ranking by heads saved without loss of accuracy, and of classes whose latents are
    shown."""
    top_latents: PositiveInt = 4
    """The number of latents that are shown for each of these classes."""
    top_images: PositiveInt = 8
    """The number of images that are shown for each latent, at most 16."""
    inside: PositiveInt = 500
    """The number of latents, the most class-selective ones, that latents.html shows with their images. The others are
    shown with numbers only."""
    dpi: Annotated[int, Field(ge=50, le=600)] = 110
    """The resolution of the PNG figures, in dots per inch."""


class MachineConfig(Section):
    """How the experiment is computed. This changes results by rounding at most, so any field may change on resume."""

    data: NonNegativeInt = 0
    """The number of devices along the mesh's axis data, over which training divides each batch. With 0 it is the number
    of all devices divided by machine.fsdp."""
    fsdp: PositiveInt = 1
    """The number of devices along the mesh's axis fsdp, for models that do not fit one device. Training divides the
    batch over them too, and it shards large parameters, their averages and the optimizer's state. With 1 every device
    holds all of these. A step gathers the parameters once: a device holds all of them while it computes the gradient,
    and only a part of them and of the optimizer's state between steps."""
    scan_layers: bool = False
    """Compile one block and loop over the layers. On a CPU compiling takes a fraction of the time, and a step takes
    slightly longer. On TPUs it compiles no faster and a step takes almost twice as long, so leave it off there;
    together with remat it saves memory."""
    remat: bool = False
    """Compute each block's intermediates again in the backward pass instead of keeping them. This needs less memory and
    takes a third more computation."""
    keep: PositiveInt = 2
    """The number of newest checkpoints of each phase that are kept. The best one on validation is kept as well."""
    prefetch: PositiveInt = 2
    """The number of training calls whose batches are decoded and sent to the devices ahead, each in a thread of its
    own."""
    profile: bool = False
    """Write a jax.profiler trace of one training call of each phase to train/profile in the workdir."""
    logger: Literal["tensorboard", "wandb"] = "tensorboard"
    """Where the curves of training are written beside metrics.jsonl. tensorboard: to train/tensorboard in the workdir.
    wandb: there and to Weights & Biases, which needs the extra `wandb` and a login, or WANDB_MODE=offline."""
    image_memory: PositiveInt = 4096
    """The most MiB that a split takes in memory when it is decoded. The images of a larger split are decoded batch by
    batch, in threads."""
    activation_cache: str = ""
    """The location of the cached residuals: a directory, or gs://bucket/path. Other runs with the same model and data
    read them too. If it is empty, it is the folder activations in the workdir."""
    sweep_memory: NonNegativeInt = 0
    """The most MiB of a device that one call of a sweep takes in addition to the parameters. If a call needs more, it
    takes fewer images or alphas at once. With 0 it is 1024 on a CPU and 6144 on a GPU or TPU, or three eighths of a
    GPU's memory if that is less."""
    sweep_chunk: NonNegativeInt = 0
    """The largest number of images on a device in one call of a sweep. With 0 it is 1000 on a GPU or TPU, and on a CPU
    what stays in its cache: 655,360 numbers of a layer's input, and at most 250 images."""
    skip: Literal["auto", "always", "never"] = "auto"
    """Whether evaluations leave out the tokens and sublayers that closed gates drop, instead of multiplying by zero.
    auto: on one device, where a cost model predicts that this saves more time than compiling takes. always: on one
    device, if gate.kinds has tokens or sublayers. never: not at all. Results differ by rounding, so a gate very close
    to its threshold may fall on the other side. Sweeps and residuals never skip."""
    peak_tflops: NonNegativeFloat = 0.0
    """The peak of a device in TFLOP/s in model.dtype. The log reports the share that training reaches (model FLOPs
    utilisation, MFU). With 0 it follows from the device's name, if that is known (TPU v4 to TPU7x; A10, A100, L4, L40S,
    H100, H200, GH200, B200)."""


class Rule(NamedTuple):
    """A check that involves several fields of a config."""

    field: str
    value: Any
    holds: bool
    allowed: str  # the valid values, for the error: "must be ..."


def _distinct(values: Sequence[Any]) -> bool:
    return len(set(values)) == len(values)


class Config(Section):
    """A complete experiment."""

    seed: Seed = 0
    """The seed of everything random, at most 2^32 - 1. The same seed on the same machine gives the same bits."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    gate: GateConfig = GateConfig()
    train: TrainConfig = TrainConfig()
    sae: SAEConfig = SAEConfig()
    grid: GridConfig = GridConfig()
    steer: SteerConfig = SteerConfig()
    layers: LayersConfig = LayersConfig()
    front: FrontConfig = FrontConfig()
    report: ReportConfig = ReportConfig()
    machine: MachineConfig = MachineConfig()

    @property
    def data_seed(self) -> int:
        """Return the seed that draws the splits and their images."""
        return self.seed if self.data.seed == -1 else self.data.seed

    @property
    def sae_layer(self) -> int:
        """Return the layer whose input the autoencoder reads, counted from 0."""
        return self.sae.layer % self.model.depth

    @property
    def view_data(self) -> DataConfig:
        """Return the section data with the augmentation of views in place of that of training images."""
        s, changes = self.sae, dict[str, Any]()
        if s.view_padding >= 0:
            changes["crop_padding"] = s.view_padding
        if s.view_flip != "data":
            changes["flip"] = s.view_flip == "on"
        return self.data.model_copy(update=changes)

    @property
    def guess_layer(self) -> int:
        """Return the layer whose input the class is guessed from, counted from 0."""
        return self.steer.guess_layer % self.model.depth if self.steer.guess_layer else self.sae_layer

    @property
    def latents(self) -> int:
        """Return F, the number of the autoencoder's latents."""
        return self.sae.latents or self.sae.expansion * self.model.width

    @property
    def gated_layers(self) -> range:
        """Return the layers that have gates of any kind, counted from 0."""
        firsts = [self.gate.settings(kind).first_layer for kind in self.gate.kinds]
        return range(min(firsts, default=self.model.depth), self.model.depth)

    @property
    def steerable_layers(self) -> range:
        """Return the layers whose CLS residual gates read; if only patches are gated, those that gate them."""
        firsts = [self.gate.settings(kind).first_layer for kind in self.gate.kinds if kind != "tokens"]
        return range(min(firsts), self.model.depth) if firsts else self.gated_layers

    def layers_with(self, kind: GateKind) -> range:
        """Return the layers that have this kind of gate, counted from 0."""
        first = self.gate.settings(kind).first_layer if kind in self.gate.kinds else self.model.depth
        return range(first, self.model.depth)

    @model_validator(mode="after")
    def _check_rules(self) -> Self:
        """Check the rules across fields, in the order of the data flow.

        Raises:
          ValueError: the first rule that does not hold.
        """
        for rules in (self._text_rules, self._image_rules, self._training_rules, self._sae_rules, self._grid_rules,
                      self._steer_rules, self._layers_rules, self._front_rules, self._machine_rules):  # fmt: skip
            for rule in rules():
                if not rule.holds:
                    raise ValueError(f"{rule.field} = {rule.value!r}: must be {rule.allowed}")
        return self

    def _text_rules(self) -> Iterator[Rule]:
        """Yield the rule of every text: names of files whose bytes are no text cannot be written to a record."""
        for section_name, section in self:
            for name, value in section if isinstance(section, Section) else ():
                for text in value if isinstance(value, tuple) else (value,):
                    if isinstance(text, str):
                        yield Rule(f"{section_name}.{name}", text, is_unicode(text), "text in UTF-8")

    def _image_rules(self) -> Iterator[Rule]:
        """Yield the rules of the sections data, model and gate."""
        d, m, kinds = self.data, self.model, self.gate.kinds
        buckets = d.source == "tfds"
        kind = "a path of this machine" + " or gs://bucket/path" * buckets
        yield Rule("data.path", d.path, has_known_scheme(d.path, buckets), kind)
        per_channel = f"one number for each of data.channels = {d.channels}"
        yield Rule(
            "model.patch", m.patch, d.image_size % m.patch == 0, f"a divisor of data.image_size = {d.image_size}"
        )
        yield Rule("model.heads", m.heads, m.width % m.heads == 0, f"a divisor of model.width = {m.width}")
        most = PATTERN_BITS - 2 * ("sublayers" in kinds)
        yield Rule("model.heads", m.heads, m.heads <= most, f"at most {most}")
        yield Rule("data.mean", d.mean, len(d.mean) == d.channels, per_channel)
        yield Rule("data.std", d.std, len(d.std) == d.channels, per_channel)
        yield Rule("data.mean", d.mean, all(0 <= mean <= 1 for mean in d.mean), f"from 0 to 1, {PIXEL_UNITS}")
        yield Rule("data.std", d.std, all(std <= 1 for std in d.std), f"at most 1, {PIXEL_UNITS}")
        published = len(d.splits) <= 3 and all(d.splits) and _distinct(d.splits)
        yield Rule("data.splits", d.splits, published, "train,test or train,validation,test, or one name, all distinct")
        one_or_more = f"at least one of {', '.join(GATE_KINDS)}, without repeats"
        yield Rule("gate.kinds", kinds, len(kinds) > 0 and _distinct(kinds), one_or_more)
        for kind in kinds:
            first, field = self.gate.settings(kind).first_layer, "" if kind == "heads" else f"{kind}."
            yield Rule(f"gate.{field}first_layer", first, first < m.depth, f"below model.depth = {m.depth}")

    def _training_rules(self) -> Iterator[Rule]:
        """Yield the rules of the section train."""
        t = self.train
        multiple = f"a multiple of train.steps_per_call = {t.steps_per_call}"
        yield Rule("train.eval_every", t.eval_every, t.eval_every % t.steps_per_call == 0, multiple)
        yield Rule("train.gated.steps", t.gated.steps, t.gated.steps > 0, "at least 1, because the gates must learn")
        no_teacher = "0, because the teacher is the dense phase's model and train.dense.steps = 0"
        place = "a directory or gs://bucket/path"
        yield Rule("train.dense_from", t.dense_from, has_known_scheme(t.dense_from), place)
        dense = "empty, because train.dense.steps = 0"
        yield Rule("train.dense_from", t.dense_from, not t.dense_from or t.dense.steps > 0, dense)
        for field in ("teacher_logits", "teacher_hidden"):
            weight = getattr(self.gate, field)
            yield Rule(f"gate.{field}", weight, weight == 0 or t.dense.steps > 0, no_teacher)

    def _sae_rules(self) -> Iterator[Rule]:
        """Yield the rules of the section sae."""
        s, most = self.sae, f"at most the {self.latents} latents"
        library, _, location = s.pretrained.partition(":")
        imported = not s.pretrained or (library in IMPORTED and location != "")
        source = "sae.latents" if s.latents else "sae.expansion * model.width"
        yield Rule("sae.layer", s.layer, self._is_gated(s.layer), f"a gated layer: {self._describe_gated_layers()}")
        yield Rule("sae.k", s.k, s.k <= self.latents, f"{most} ({source})")
        d = self.view_data
        changed = d.crop_padding > 0 or d.crop_scale < 1 or d.flip or d.rand_augment_ops > 0
        no_change = (
            "1, because all views would be alike: sae.view_padding, sae.view_flip, data.crop_scale and "
            "data.rand_augment_ops change nothing; set sae.view_padding or sae.view_flip"
        )
        yield Rule("sae.views", s.views, s.views == 1 or changed, no_change)
        yield Rule("sae.k_start", s.k_start, s.k_start <= self.latents, most)
        yield Rule("sae.aux_k", s.aux_k, s.aux_k <= self.latents, most)
        one_seed = "1, because sae.pretrained names one autoencoder"
        yield Rule("sae.seeds", s.seeds, not s.pretrained or s.seeds == 1, one_seed)
        yield Rule("sae.pretrained", s.pretrained, imported, " or ".join(IMPORTED.values()))
        yield Rule(
            "sae.prefixes", s.prefixes, list(s.prefixes) == sorted(set(s.prefixes)), "rising shares, without repeats"
        )
        yield Rule("sae.warmup", s.warmup, s.warmup + s.decay <= 1, f"at most 1 - sae.decay = {1 - s.decay:g}")

    def _grid_rules(self) -> Iterator[Rule]:
        """Yield the rules of the section grid."""
        g = self.grid
        possible = _distinct(g.k) and all(k <= self.latents for k in g.k)
        yield Rule("grid.k", g.k, possible, f"distinct numbers, each at most the {self.latents} latents")
        yield Rule("grid.learning_rates", g.learning_rates, _distinct(g.learning_rates), "distinct numbers")

    def _steer_rules(self) -> Iterator[Rule]:
        """Yield the rules of the section steer."""
        t, heads = self.steer, self.model.heads
        tabled = [name for name in t.strategies if name in TABLE_STRATEGIES]
        few_heads = not tabled or "heads" not in self.gate.kinds or heads <= MOST_HEADS
        untabled = (
            f"without {', '.join(map(repr, tabled))}, which tries all 2^heads subsets: model.heads = {heads} is above "
            f"{MOST_HEADS}"
        )
        named = len(t.strategies) > 0 and _distinct(t.strategies)
        yield Rule("steer.strategies", t.strategies, few_heads, untabled)
        yield Rule("steer.strategies", t.strategies, named, "at least one name, without repeats")
        yield Rule("steer.latents", t.latents, t.latents <= self.latents, f"at most the {self.latents} latents")
        yield Rule(
            "steer.alphas", t.alphas, len(t.alphas) > 0 and _distinct(t.alphas), "at least one number, without repeats"
        )
        yield Rule("steer.classes", t.classes, _distinct(t.classes), "distinct names")
        guess, depth = t.guess_layer, self.model.depth
        known = -depth <= guess < depth and (not guess or 1 <= guess % depth <= self.sae_layer)
        earlier = f"0, or a layer from 1 to the steered one, sae.layer = {self.sae_layer}, because a guess comes first"
        yield Rule("steer.guess_layer", guess, known, earlier)
        limits = f"0, or at least steer.tolerance = {t.tolerance:g}"
        yield Rule("steer.allowed_loss", t.allowed_loss, t.claimed_loss >= t.tolerance, limits)

    def _machine_rules(self) -> Iterator[Rule]:
        """Yield the rules of the section machine."""
        cache = self.machine.activation_cache
        yield Rule("machine.activation_cache", cache, has_known_scheme(cache), "a directory or gs://bucket/path")

    def _layers_rules(self) -> Iterator[Rule]:
        """Yield the rules of the section layers."""
        layers, alphas = self.layers.layers, self.layers.alphas
        gated = all(map(self._is_gated, layers)) and _distinct([layer % self.model.depth for layer in layers])
        steering = len(alphas) > 0 and _distinct(alphas) and 0 not in alphas
        yield Rule("layers.layers", layers, gated, f"distinct gated layers: {self._describe_gated_layers()}")
        yield Rule("layers.alphas", alphas, steering, "at least one number, without repeats; 0 is always included")

    def _front_rules(self) -> Iterator[Rule]:
        """Yield the rule of the section front."""
        budgets = self.front.budgets
        yield Rule("front.budgets", budgets, _distinct(budgets), "distinct shares")

    def _is_gated(self, layer: int) -> bool:
        """Say whether a layer, which may be counted from the end, has gates that can be steered."""
        return -self.model.depth <= layer < self.model.depth and layer % self.model.depth in self.steerable_layers

    def _describe_gated_layers(self) -> str:
        gated = self.steerable_layers
        return f"{gated.start} to {gated.stop - 1}, or from the end -{len(gated)} to -1"
