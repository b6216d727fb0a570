"""The effect of a reconstruction that the gate reads, against the whole model with an intervention."""

import jax
import jax.numpy as jnp
import numpy as np
from builders import setting, steer_config, trained_model

from headsteer_jax.data.augment import preprocess
from headsteer_jax.data.dataset import Split
from headsteer_jax.model.vit import Intervention
from headsteer_jax.steer.replacement import measure_replacement


def test_the_gate_reads_the_reconstruction(split: Split) -> None:
    trained = trained_model(steer_config())
    config, sae, layer = trained.config, setting().sae, trained.config.sae_layer
    effect = measure_replacement(trained, jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], sae), split)
    found = {}
    for name, interventions in {
        "unchanged": {},
        "gate": {layer: Intervention(gate_input=sae.reconstruct)},
        "block": {layer: Intervention(gate_input=sae.reconstruct, steer_residual=True)},
    }.items():
        images = preprocess(split.images, config.data)
        logits, out = trained.model.apply(trained.params, images, gating="thresholded", interventions=interventions)
        found[name] = np.argmax(logits, axis=-1) == split.labels, np.asarray(out["gates"][layer]["heads"]) > 0
    right, gates = ({name: values[part] for name, values in found.items()} for part in (0, 1))
    assert 0 < np.mean(gates["gate"] != gates["unchanged"]) < 1
    np.testing.assert_allclose(effect.gate_agreement, [np.mean(gates["gate"] == gates["unchanged"])], rtol=1e-6)
    np.testing.assert_allclose(effect.usage, [gates["gate"].mean()], rtol=1e-6)
    np.testing.assert_allclose(effect.usage_change, [gates["gate"].mean() - gates["unchanged"].mean()], atol=1e-7)
    np.testing.assert_allclose(effect.accuracy, [right["gate"].mean()], rtol=1e-6)
    np.testing.assert_allclose(effect.accuracy_change, [right["gate"].mean() - right["unchanged"].mean()], atol=1e-7)
    np.testing.assert_allclose(effect.accuracy_residual, [right["block"].mean()], rtol=1e-6)
