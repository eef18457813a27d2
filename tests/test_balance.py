"""Balancing in the model: biases that select, noise, capacity, experts that choose, and layers without experts."""

import dataclasses
from unittest import mock

import numpy as np
from gradients import assert_close
from strategies import SMALL, make_batch, make_model

import tinymoe.model as module
from tinymoe import Mixtral


def test_bias_selects_experts_and_has_exactly_no_gradient():
    model, batch = make_model(dataclasses.replace(SMALL, bias_update_rate=0.01)), make_batch()
    plain = Mixtral(SMALL, {name: p for name, p in model.params.items() if not name.endswith("bias")}, num_workers=1)
    for layer in range(2):
        model.params[f"layers.{layer}.moe.bias"][:] = [0, 0, 0, -9]
    _, grads = model.loss_and_grads(*batch)
    assert not any(grads[f"layers.{layer}.moe.bias"].any() for layer in range(2))
    assert not model.losses.load[:, 3].any()
    assert not any((experts == 3).any() for experts in model.extend([batch[0][0]], [model.cache(9)])[1])
    plain.loss_and_grads(*batch)
    assert plain.losses.load[:, 3].all()


def test_noise_is_of_the_batch_whoever_computes_it_and_only_in_training():
    config = dataclasses.replace(SMALL, router_jitter=0.3, noisy_top_k=True, dim=128)
    models = [make_model(config, num_workers=workers) for workers in (1, 3)]
    tokens, targets = make_batch(config, B=6, T=16)
    with mock.patch.object(module, "LEAST_PART", 1):
        losses = [model.loss_and_grads(tokens, targets)[0] for model in models]
        assert len(models[1]._split(tokens)) == 3
    assert_close(*losses, 1e-12)
    assert losses[0] == models[0].loss_and_grads(tokens, targets)[0]
    off = dict(aux_loss_coef=0.0, z_loss_coef=0.0)
    quiet = Mixtral(dataclasses.replace(SMALL, dim=128), _without(models[0].params, "noise"), num_workers=1)
    assert models[0].loss(tokens, targets) == quiet.loss(tokens, targets)
    noisy, plain = (model.loss_and_grads(tokens, targets, **off)[0] for model in (models[0], quiet))
    assert noisy != plain


def test_capacity_drops_in_training_only_and_says_how_much():
    config = dataclasses.replace(SMALL, capacity_factor=0.5)
    model, batch = make_model(config), make_batch()
    off = dict(aux_loss_coef=0.0, z_loss_coef=0.0)
    limited, _ = model.loss_and_grads(*batch, **off)
    assert (model.losses.dropped >= 0.5 - 4 / 48).all()  # half, but for what rounding the capacity up leaves
    assert (model.losses.dropped < 1).all()
    assert_close(model.losses.load.sum(axis=1), [1, 1], 1e-12)
    plain = Mixtral(SMALL, model.params, num_workers=1)
    assert model.loss(*batch) == plain.loss(*batch)
    assert limited != plain.loss_and_grads(*batch, **off)[0]
    assert not plain.losses.dropped.any()


def test_expert_choice_sees_the_future_and_token_choice_does_not():
    tokens, _ = make_batch(B=1, T=12)
    changed = tokens.copy()
    changed[0, -1] = (changed[0, -1] + 1) % 7
    for by_experts in (False, True):
        model = make_model(dataclasses.replace(SMALL, expert_choice=by_experts, n_layers=2))
        first, second = model(tokens)[0, :-1], model(changed)[0, :-1]
        assert np.array_equal(first, second) != by_experts


def test_every_other_layer_has_experts():
    config = dataclasses.replace(SMALL, n_layers=5, moe_every=2)
    assert list(config.moe_layers) == [1, 3]
    model = make_model(config)
    model.loss_and_grads(*make_batch())
    assert [layer for layer in range(5) if model.losses.load[layer].any()] == [1, 3]
    assert [f"layers.{layer}.moe.gate" in model.params for layer in range(5)] == [False, True, False, True, False]
    assert len(model.router_logits(make_batch()[0])) == 2
    assert config.count_parameters() == sum(p.size for p in model.params.values())
    expert = 3 * config.dim * config.hidden_dim
    assert config.count_active_parameters() == config.count_parameters() - 2 * (4 - 2) * expert


def _without(params, word):
    return {name: p for name, p in params.items() if word not in name}
