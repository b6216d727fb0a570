"""What is cut for some classes: the order, the refits and the sizes, against brute force; the models that follow."""

import itertools

import jax
import numpy as np
import pytest
import xarray
from builders import blobs, setting, steer_config, tiny_config, trained_model

from headsteer_jax.config import Config
from headsteer_jax.data.augment import preprocess
from headsteer_jax.data.dataset import Dataset
from headsteer_jax.deploy.calibration import Moments, fit_projection, sum_moments
from headsteer_jax.deploy.convert import convert_model, cut_model, keep_all
from headsteer_jax.deploy.cost import count_attention_macs, count_fixed_macs, count_macs, count_mlp_macs
from headsteer_jax.deploy.distil import distil_model
from headsteer_jax.deploy.images import ClassImages, answer_images, draw_images, select_images
from headsteer_jax.deploy.importance import order_removals
from headsteer_jax.deploy.model import DeployedModel
from headsteer_jax.deploy.proposals import join_proposals, propose_open_heads, propose_swept_heads
from headsteer_jax.deploy.refit import refit_classifier, refit_model
from headsteer_jax.deploy.selection import Option, choose_sizes, least_budget, measure_options
from headsteer_jax.deploy.specialise import Goal, check_budget, specialise
from headsteer_jax.deploy.steered import ClassSteering, check_foldable, find_choice, fold_steering
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.model.vit import Intervention
from headsteer_jax.steer.steering import apply_steering
from headsteer_jax.steer.strategies import Choice

NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def images() -> ClassImages:
    dataset = Dataset(blobs(90, 0), blobs(30, 1), blobs(60, 2), NAMES)
    return select_images(dataset, np.array([2, 0]))


@pytest.fixture(scope="module")
def model(images: ClassImages) -> DeployedModel:
    whole = convert_model(trained_model(tiny_config(), 3), NAMES, np.array([2, 0]), (8, 8, 1))
    return distil_model(whole, whole, images.train, 40, tiny_config())


def make_moments(rng: np.random.Generator, features: int, rows: int = 400) -> tuple[np.ndarray, np.ndarray, Moments]:
    f = (rng.standard_normal((rows, features)) @ rng.standard_normal((features, features)) + 1).astype(np.float32)
    t = rng.standard_normal((rows, 5)).astype(np.float32)
    return f, t, sum_moments([f[None, :100], f[None, 100:]], [t[None, :100], t[None, 100:]])


def residual_after(f: np.ndarray, t: np.ndarray, stay: np.ndarray) -> float:
    """Return the squared error of the best fit of t by some features and a constant."""
    inputs = np.concatenate([f[:, stay], np.ones((len(f), 1))], axis=1).astype(np.float64)
    return float(np.sum((inputs @ np.linalg.lstsq(inputs, t, rcond=None)[0] - t) ** 2))


def test_images_of_the_classes_are_selected_and_numbered_anew(images: ClassImages) -> None:
    assert {name: np.bincount(getattr(images, name).labels).tolist() for name in images._fields} == {
        "train": [30, 30], "validation": [10, 10], "test": [20, 20],
    }  # fmt: skip
    np.testing.assert_array_equal(images.test.images[images.test.labels == 0], blobs(60, 2).images[2::3])
    drawn, labels = draw_images(images.train, 10, 0)
    assert sum(np.any([(image == own).all() for own in images.train.images]) for image in drawn) == 10
    np.testing.assert_array_equal(np.bincount(labels), [5, 5])


def test_a_projection_is_the_least_squares_fit_of_what_stays() -> None:
    rng = np.random.default_rng(0)
    f, t, moments = make_moments(rng, 8)
    stay = np.array([0, 3, 6])
    dense = {"kernel": rng.standard_normal((8, 5)), "bias": rng.standard_normal(5)}
    fitted = fit_projection(moments, stay, dense, 1e-9)
    assert not fitted["kernel"][[1, 2, 4, 5, 7]].any()
    error = float(np.sum((f @ fitted["kernel"] + fitted["bias"] - t) ** 2))
    assert error == pytest.approx(residual_after(f, t, stay), rel=1e-4)
    firm = fit_projection(moments, stay, dense, 1e9)  # so damped that the weights stay as they are
    np.testing.assert_allclose(firm["kernel"][stay], dense["kernel"][stay], atol=1e-5)


@pytest.mark.parametrize("group", [1, 2])
def test_the_first_that_goes_is_the_one_that_the_others_replace_best(group: int) -> None:
    rng = np.random.default_rng(1)
    f, _, moments = make_moments(rng, 6)
    kernel = rng.standard_normal((6, 5))
    t = f @ kernel
    order, left = order_removals(moments, kernel, group, 1), list(range(6 // group))
    for going in order[:-1]:
        errors = {}
        for candidate in left:
            stay = [group * unit + k for unit in left if unit != candidate for k in range(group)]
            errors[candidate] = residual_after(f, t, np.array(stay))
        assert errors[going] <= 1.02 * min(errors.values())  # damping may swap equals
        left.remove(going)
    assert sorted(order) == list(range(6 // group))


def test_features_without_effect_go_first() -> None:
    rng = np.random.default_rng(2)
    _, _, moments = make_moments(rng, 6)
    kernel = rng.standard_normal((6, 5))
    kernel[[1, 4]] = 0
    assert set(order_removals(moments, kernel, 1, 1)[:2]) == {1, 4}


def test_sizes_are_the_best_of_all_combinations_within_the_budget() -> None:
    config = convert_model(trained_model(tiny_config()), tuple("abcdefg"), np.arange(7), (8, 8, 1)).config
    rng, options = np.random.default_rng(3), []
    for layer in range(3):
        for count, sizes in ((count_attention_macs, (3, 1, 0)), (count_mlp_macs, (96, 40, 0))):
            losses = [0.0, *np.sort(rng.random(2))]
            options.append([
                Option(np.arange(size), count(config, layer, size), loss)
                for size, loss in zip(sizes, losses, strict=True)
            ])  # fmt: skip
    for budget in (0.3, 0.55, 0.8):
        kept = choose_sizes(config, options, budget)
        cut = config.model_copy(update={"heads": tuple(map(len, kept.heads)), "neurons": tuple(map(len, kept.neurons))})
        assert count_macs(cut) <= budget * count_macs(config)
        sizes = [len(part) for pair in zip(kept.heads, kept.neurons, strict=True) for part in pair]
        loss = sum(next(o.loss for o in group if len(o.stay) == n) for group, n in zip(options, sizes, strict=True))
        room = 0.998 * budget * count_macs(config) - count_fixed_macs(config)  # the knapsack rounds every size up
        possible = (pick for pick in itertools.product(*options) if sum(option.macs for option in pick) <= room)
        assert loss <= min(sum(option.loss for option in pick) for pick in possible) + 1e-12


def test_refitting_a_whole_model_changes_nothing(model: DeployedModel, images: ClassImages) -> None:
    fitted = refit_model(model, keep_all(model.config), images.train.images)
    np.testing.assert_allclose(fitted.apply(images.test.images), model.apply(images.test.images), atol=2e-3)


def test_parts_without_effect_are_cut_without_a_change(model: DeployedModel, images: ClassImages) -> None:
    params = jax.tree.map(np.array, model.params)
    params["layers"][0]["out"]["kernel"][8:16] = 0
    params["layers"][1]["mlp_out"]["kernel"][::2] = 0
    idle = DeployedModel(model.config, params)
    options = measure_options(idle, images.train.images, images.train.images[:20], lambda layer: [], lambda: None)
    one_less = next(option for option in options[0] if len(option.stay) == 2)
    assert one_less.stay.tolist() == [0, 2]
    assert abs(one_less.loss) < 1e-4
    half = next(option for option in options[3] if len(option.stay) == 48)
    assert half.stay.tolist() == list(range(1, 96, 2))
    everything = keep_all(idle.config)
    kept = everything._replace(
        heads=(one_less.stay, *everything.heads[1:]),
        neurons=(everything.neurons[0], half.stay, everything.neurons[2]),
    )
    np.testing.assert_allclose(
        cut_model(idle, kept).apply(images.test.images), idle.apply(images.test.images), atol=1e-5
    )


def test_a_refit_keeps_answers_that_plain_cutting_loses(model: DeployedModel, images: ClassImages) -> None:
    everything = keep_all(model.config)
    kept = everything._replace(heads=(np.array([0]), np.array([1]), np.array([], int)))
    whole = np.asarray(model.apply(images.test.images))
    fitted = refit_model(model, kept, images.train.images)
    plain = cut_model(model, kept)
    errors = [np.abs(np.asarray(cut.apply(images.test.images)) - whole).mean() for cut in (fitted, plain)]
    assert errors[0] < 0.7 * errors[1]


def classification_loss(model: DeployedModel, x_BD: np.ndarray, labels: np.ndarray) -> float:
    """Compute the mean cross-entropy of CLS residuals, in float64."""
    norm, head = (jax.tree.map(lambda w: np.asarray(w, np.float64), model.params[name]) for name in ("norm", "head"))
    x_BD = x_BD.astype(np.float64)
    centred_BD = x_BD - x_BD.mean(axis=1, keepdims=True)
    n_BD = centred_BD / np.sqrt(x_BD.var(axis=1, keepdims=True) + model.config.model.layer_norm_epsilon)
    logits_BC = (n_BD * norm["scale"] + norm["bias"]) @ head["kernel"] + head["bias"]
    log_total_B = np.logaddexp.reduce(logits_BC, axis=1)
    return float(np.mean(log_total_B - logits_BC[np.arange(len(labels)), labels]))


def test_the_classifier_is_fitted_only_as_far_as_validation_gains(model: DeployedModel) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 24)).astype(np.float32)
    labels = (x[:, 0] > x.mean(axis=1)).astype(int)
    validation = x[100:], labels[100:]
    fitted = refit_classifier(model, (x[:100], labels[:100]), validation)
    changed = fitted.params["head"]["kernel"] - model.params["head"]["kernel"]
    assert np.abs(changed).max() > 0.01
    assert classification_loss(fitted, *validation) < classification_loss(model, *validation) - 0.1
    shuffled, opposite = rng.permutation(labels), (x[100:], 1 - labels[100:])  # nothing can be learned from these
    kept = refit_classifier(model, (x[:100], shuffled[:100]), opposite)
    assert classification_loss(kept, *opposite) <= classification_loss(model, *opposite) + 1e-9


@pytest.mark.parametrize("goal", [Goal(0.45, 0.0), Goal(None, 0.1)])
def test_a_specialised_model_keeps_its_promise(model: DeployedModel, images: ClassImages, goal: Goal) -> None:
    made = specialise(model, images, goal, lambda layer: [np.array([layer])], seed=0)
    share = count_macs(made.model.config) / count_macs(model.config)
    if goal.budget:
        assert share <= goal.budget
    else:
        assert made.validation.accuracy >= made.dense_validation.accuracy - 0.1
        assert share < 1
    answers = answer_images(made.model, images.validation, "validation")
    np.testing.assert_array_equal(answers.prediction, made.validation.prediction)
    assert made.dense.config == model.config
    again = specialise(model, images, goal, lambda layer: [np.array([layer])], seed=0)
    jax.tree.map(np.testing.assert_array_equal, again.model.params, made.model.params)


def test_a_budget_below_what_cannot_be_cut_is_refused(model: DeployedModel) -> None:
    least = least_budget(model.config)
    check_budget(model.config, Goal(least + 1e-4, 0.0))
    with pytest.raises(HeadSteerError, match=f"cannot be met; the least is 0.{int(np.ceil(least * 1e4)):04d}"):
        check_budget(model.config, Goal(least / 2, 0.0))


def test_nothing_is_cut_if_every_cut_loses_too_much(model: DeployedModel, images: ClassImages) -> None:
    made = specialise(model, images, Goal(None, -1.0), lambda layer: [], seed=0)  # more than right is asked for
    assert made.model.config == model.config
    np.testing.assert_array_equal(made.model.apply(images.test.images), model.apply(images.test.images))


@pytest.mark.parametrize("steer", [{"form": "replace"}, {"mode": "scale"}, {"target": "residual"}])
def test_steering_that_depends_on_the_image_does_not_fold(steer: dict[str, str]) -> None:
    check_foldable(steer_config(), 2.0)
    with pytest.raises(HeadSteerError, match="folds into the gates' biases only with"):
        check_foldable(steer_config(**steer), 2.0)
    with pytest.raises(HeadSteerError, match=r"gate\.layer_norm = False"):
        check_foldable(steer_config(gate={"layer_norm": True}), 2.0)


def test_distilling_makes_up_for_what_was_cut(model: DeployedModel, images: ClassImages) -> None:
    everything = keep_all(model.config)
    cut = cut_model(model, everything._replace(neurons=(np.arange(8),) * 3))
    trained = distil_model(cut, model, images.train, 30, tiny_config())
    assert trained.config == cut.config
    labels = np.arange(len(images.train.labels)), images.train.labels
    before, after = (jax.nn.log_softmax(m.apply(images.train.images))[labels].mean() for m in (cut, trained))
    assert after > before + 0.05


def test_the_gates_propose_the_heads_that_they_open_most(images: ClassImages) -> None:
    config = tiny_config(first_layer=2)
    trained = trained_model(config, 3)
    bias = trained.params["params"]["layers_2"]["decide"]["linear"]
    bias["bias"] = np.array([100.0, -100.0, 50.0], np.float32)
    proposals = propose_open_heads(trained, images, np.array([4, 6]), 0)
    assert proposals(1) == []
    assert [stay.tolist() for stay in proposals(2)] == [[0], [0, 2]]


def test_the_sweep_proposes_the_subsets_that_answer_and_the_heads_that_steering_leaves_open() -> None:
    config = tiny_config(kinds=("heads", "sublayers"))
    layer, patterns = config.sae_layer, np.arange(32)  # three heads, attention and MLP
    labels, rng = np.repeat(np.arange(3), 4), np.random.default_rng(0)
    table = np.full((12, 32), 9)
    table[labels == 1] = np.where((patterns & 0b11010) == 0b11010, 1, 9)  # right if head 1, attention and MLP run
    table[labels == 2, 0b11101] = 2  # and with heads 0 and 2
    table[labels == 0] = 0  # not asked for
    heads_on = rng.integers(0, 3, (2, 1, 1, 4, 3, 5))
    heads_on[1, 0, 0, 2, 1:, :3] = [[5, 0, 7], [5, 0, 7]]
    arrays = {
        "subset": patterns, "validation_labels": labels, "validation_table": table,
        "validation_heads_on": heads_on, "chosen": np.array([[0], [2]]),
    }  # fmt: skip
    proposals = propose_swept_heads(config, arrays, np.array([1, 2]))
    assert proposals(layer - 1) == []
    sets = [stay.tolist() for stay in proposals(layer)]
    assert sets[0] == [1]
    assert sets[1] in ([0, 1], [0, 2], [1, 2])  # each answers four images
    assert sets[-2:] == [[2], [0, 2]]
    joined = join_proposals(proposals, lambda layer: [np.array([1]), np.array([0])])
    assert sorted(map(tuple, joined(layer))) == sorted({*map(tuple, sets), (0,)})
    ungated = tiny_config(kinds=("sublayers",))
    assert propose_swept_heads(ungated, arrays, np.array([1, 2]))(layer) == []


@pytest.mark.parametrize("by_direction", [False, True])
@pytest.mark.parametrize("kinds", [("heads",), ("heads", "sublayers", "tokens")])
def test_folded_steering_opens_the_gates_that_steering_opens(kinds: tuple[str, ...], by_direction: bool) -> None:
    config: Config = tiny_config(kinds=kinds)
    trained, steering, label, alpha = trained_model(config), setting(), 3, 1.5
    if by_direction:
        latents, weights, _ = steering.choice
        v_CD = 4 * np.random.default_rng(2).standard_normal((len(latents), config.model.width)).astype(np.float32)
        steering = steering._replace(choice=Choice(latents[:, :0], weights[:, :0], v_CD))
    whole = convert_model(trained, tuple("abcdefg"), np.arange(7), (8, 8, 1), dynamic=True)
    chosen = Choice(*(None if part is None else part[[label]] for part in steering.choice))
    folded = fold_steering(whole, config, ClassSteering(steering.sae, steering.strength, chosen), alpha)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)

    def steer(x_BD: jax.Array) -> jax.Array:
        return apply_steering(steering, x_BD, np.full(len(x_BD), label), np.float32(alpha), config.steer)

    expected, out = trained.model.apply(
        trained.params,
        preprocess(pixels, config.data),
        interventions={config.sae_layer: Intervention(gate_input=steer)},
    )
    np.testing.assert_allclose(folded.apply(pixels), expected, atol=3e-5, rtol=3e-5)
    plain, before = trained.model.apply(trained.params, preprocess(pixels, config.data))
    assert np.abs(np.asarray(plain) - expected).max() > 0.01
    assert (out["gates"][config.sae_layer]["heads"] != before["gates"][config.sae_layer]["heads"]).any()


def test_what_a_strategy_chose_is_found_or_refused() -> None:
    """Of three strategies one changes latents, one has directions, and one chooses for each image."""
    latents = np.full((3, 1, 4, 2), -1)
    latents[0] = 5
    directions = np.zeros((3, 1, 4, 6), np.float32)
    directions[1] = np.arange(4)[:, None]
    places, width = ("strategy", "seed", "class", "place"), ("strategy", "seed", "class", "width")
    sweep = xarray.Dataset(
        {"latents": (places, latents), "weights": (places, np.ones(latents.shape)), "directions": (width, directions)},
        {"strategy": ["class", "probe", "image_latents"]},
    )
    labels = np.array([1, 3])
    assert find_choice(sweep, "class", labels).directions is None
    assert find_choice(sweep.drop_vars("directions"), "class", labels).latents.tolist() == [[5, 5], [5, 5]]
    np.testing.assert_array_equal(find_choice(sweep, "probe", labels).directions, directions[1, 0, [1, 3]])
    for strategy, text in (("image_latents", "chooses for each image"), ("best", "no such strategy")):
        with pytest.raises(HeadSteerError, match=text):
            find_choice(sweep, strategy, labels)
