"""The model's gradients by finite differences, and the terms of its loss."""

import dataclasses

import numpy as np
import pytest
from gradients import assert_close, check_gradients
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import SMALL, batches, make_batch, make_model, models

from tinymoe import AdamW, Mixtral
from tinymoe.reference import expert_load, switch_loss, z_loss
from tinymoe.reference.loss import IGNORED
from tinymoe.reference.router import top_k_ids

VARIANTS = {
    "plain": {},
    "dense": dict(num_experts=0, top_k_experts=0),
    "tied": dict(tie_embeddings=True),
    "window": dict(sliding_window=3),
    "top-1": dict(top_k_experts=1),
    "all experts": dict(top_k_experts=4),
    "one head": dict(n_heads=1, n_kv_heads=1, head_dim=4),
    "every other layer": dict(moe_every=2),
    "capacity": dict(capacity_factor=0.8),
    "jitter": dict(router_jitter=0.1),
    "noisy top-k": dict(noisy_top_k=True),
    "bias": dict(bias_update_rate=0.01),
    "expert choice": dict(expert_choice=True),
    "all but expert choice": dict(capacity_factor=1.0, router_jitter=0.1, noisy_top_k=True, bias_update_rate=0.01),
}


def check_model_gradients(model, batch, **how):
    """Compare every parameter's gradient with finite differences; False if some step changed a token's experts."""
    loss, grads = model.loss_and_grads(*batch)
    load, names, flips = model.losses.load, list(model.params), []

    def training_loss(*arrays):
        moved = Mixtral(model.config, dict(zip(names, arrays)), num_workers=1)
        loss, _ = moved.loss_and_grads(*batch)
        flips.append(not np.array_equal(moved.losses.load, load))
        return loss

    assert training_loss(*model.params.values()) == loss
    arrays, of_arrays = [model.params[name] for name in names], [grads[name] for name in names]
    try:
        check_gradients(training_loss, arrays, of_arrays, **how)
    except AssertionError:
        if not any(flips):
            raise
    return not any(flips)


# Gradients.


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_gradients_equal_finite_differences(changes):
    config = dataclasses.replace(SMALL, **changes)
    tokens, targets = make_batch(config, B=2, T=6)
    targets[0, :2] = IGNORED
    assert check_model_gradients(make_model(config), (tokens, targets), full=24)


@given(models(), st.data())
def test_gradients_of_any_model_equal_finite_differences(model, data):
    batch = data.draw(batches(model.config))
    assume(check_model_gradients(model, batch, full=0, directions=1))


@given(models(), st.data())
def test_float32_equals_float64(model, data):
    batch = data.draw(batches(model.config))
    single = Mixtral(model.config, {name: p.astype(np.float32) for name, p in model.params.items()}, num_workers=1)
    double = Mixtral(model.config, {name: p.astype(np.float64) for name, p in single.params.items()}, num_workers=1)
    (loss, grads), (expected_loss, expected) = single.loss_and_grads(*batch), double.loss_and_grads(*batch)
    assume(np.array_equal(single.losses.load, double.losses.load))
    assert_close(loss, expected_loss, 1e-5)
    assert single(batch[0]).dtype == np.float32
    for name, grad in grads.items():
        assert grad.dtype == np.float32
        assert_close(grad, expected[name], 1e-3, floor=1.0)


@given(models(), st.data())
def test_backward_gives_a_gradient_for_each_parameter_and_changes_none(model, data):
    before = {name: p.copy() for name, p in model.params.items()}
    _, grads = model.loss_and_grads(*data.draw(batches(model.config)))
    assert list(grads) == list(model.params)
    for name, p in model.params.items():
        np.testing.assert_array_equal(p, before[name])
        assert grads[name].shape == p.shape
        assert not np.shares_memory(grads[name], p)


def test_tied_head_gets_the_sum_of_both_gradients():
    tied = make_model(dataclasses.replace(SMALL, tie_embeddings=True))
    params = tied.params | {"output": tied.params["tok_embeddings"].copy()}
    untied = Mixtral(SMALL, params, num_workers=1)
    (loss, grads), (untied_loss, untied_grads) = (m.loss_and_grads(*make_batch()) for m in (tied, untied))
    assert loss == untied_loss
    assert_close(grads["tok_embeddings"], untied_grads["tok_embeddings"] + untied_grads["output"], 1e-14)
    np.testing.assert_array_equal(tied(make_batch()[0]), untied(make_batch()[0]))


@pytest.mark.parametrize("coefficients", [dict(aux_loss_coef=0.5), dict(z_loss_coef=0.5)], ids=["switch", "z"])
def test_balance_losses_reach_the_gate_even_where_the_weights_cannot(coefficients):
    model = make_model(dataclasses.replace(SMALL, top_k_experts=1))
    off = dict(aux_loss_coef=0.0, z_loss_coef=0.0)
    for named, reached in ((off, False), (off | coefficients, True)):
        _, grads = model.loss_and_grads(*make_batch(), **named)
        assert all(grads[f"layers.{layer}.moe.gate"].any() == reached for layer in range(2))


def test_expert_without_tokens_gets_exactly_zero_gradient():
    model = make_model()
    _, grads = model.loss_and_grads(*make_batch(B=1, T=1))  # one token has two of four experts
    for layer, load in enumerate(model.losses.load):
        assert np.count_nonzero(load) == 2
        for name in ("w1", "w2", "w3"):
            np.testing.assert_array_equal(grads[f"layers.{layer}.moe.{name}"].any(axis=(1, 2)), load > 0)


def test_steps_of_adamw_lower_the_loss():
    model = make_model()
    optimizer = AdamW(model.params, learning_rate=0.01)
    before, _ = model.loss_and_grads(*make_batch())
    for _ in range(30):
        loss, grads = model.loss_and_grads(*make_batch())
        optimizer.step(grads)
    assert loss < 0.5 * before


# The loss and its terms.


@given(models(), st.data())
def test_loss_is_the_mean_over_the_targets_that_count(model, data):
    tokens, targets = data.draw(batches(model.config))
    logits = model(tokens)
    normaliser = np.log(np.exp(logits - logits.max(axis=2, keepdims=True)).sum(axis=2)) + logits.max(axis=2)
    counted = targets != IGNORED
    chosen = np.take_along_axis(logits, np.where(counted, targets, 0)[..., None], axis=2)[..., 0]
    expected = (normaliser - chosen)[counted].mean()
    assert_close(model.loss(tokens, targets), expected, 1e-12)
    model.loss_and_grads(tokens, targets)
    assert_close(model.losses.cross_entropy, expected, 1e-12)


@given(models(), st.data())
def test_terms_of_the_loss_add_up_to_it(model, data):
    config, losses = model.config, []
    batch = data.draw(batches(config))
    for named in ({}, dict(aux_loss_coef=0.7), dict(z_loss_coef=0.9), dict(aux_loss_coef=0.0, z_loss_coef=0.0)):
        loss, _ = model.loss_and_grads(*batch, **named)
        terms = model.losses
        aux = named.get("aux_loss_coef", config.aux_loss_coef) if config.num_experts else 0
        z = named.get("z_loss_coef", config.z_loss_coef) if config.num_experts else 0
        assert terms.switch.shape == terms.z.shape == (config.n_layers,)
        assert_close(loss, terms.cross_entropy + aux * terms.switch.mean() + z * terms.z.mean(), 1e-14)
        assert terms.load.shape == (config.n_layers, config.num_experts)
        assert_close(terms.load.sum(axis=1), np.full(config.n_layers, float(config.num_experts > 0)), 1e-14)
        assert terms.z.all() == (z > 0)
        losses.append(terms.cross_entropy)
    assert len(set(losses)) == 1, "the cross-entropy knows nothing of the coefficients"


@given(models(), st.data())
def test_balance_terms_are_those_of_each_layers_router(model, data):
    batch = data.draw(batches(model.config))
    model.loss_and_grads(*batch, z_loss_coef=0.5)
    layers = model.router_logits(batch[0])
    assert len(layers) == (model.config.n_layers if model.config.num_experts else 0)
    for logits, switch, z, load in zip(layers, *model.losses[1:4]):
        assert logits.shape == (batch[0].size, model.config.num_experts)
        np.testing.assert_array_equal(load, expert_load(top_k_ids(logits, model.config.top_k_experts), len(load)))
        assert_close(switch, switch_loss(logits, load)[0], 1e-14)
        assert_close(z, z_loss(logits)[0], 1e-14)


def test_ignored_targets_contribute_nothing():
    model, (tokens, targets) = make_model(), make_batch(B=2)
    targets[1] = IGNORED
    off = dict(aux_loss_coef=0.0, z_loss_coef=0.0)
    (loss, grads), (alone, alone_grads) = (model.loss_and_grads(tokens[:n], targets[:n], **off) for n in (2, 1))
    assert_close(loss, alone, 1e-14)
    for name, grad in grads.items():
        assert_close(grad, alone_grads[name], 1e-12)
