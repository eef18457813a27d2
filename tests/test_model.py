"""The model: its gradients, its loss, its batch cut over workers, and what it refuses."""

import dataclasses
import math
from unittest import mock

import numpy as np
import pytest
from gradients import assert_close, check_gradients
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import SMALL, configs, random_params, rngs

import tinymoe.model as module
from tinymoe import AdamW, InputError, Mixtral, MixtralConfig
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


def make_model(config=SMALL, seed=0, dtype=np.float64, num_workers=1):
    return Mixtral(config, random_params(config, np.random.default_rng(seed), dtype), num_workers=num_workers)


@st.composite
def models(draw):
    config = dataclasses.replace(draw(configs()), n_layers=draw(st.integers(1, 2)))
    return Mixtral(config, random_params(config, draw(rngs)), num_workers=1)


@st.composite
def batches(draw, config):
    """Draw tokens and targets; some are ignored, but never all."""
    B, T, rng = draw(st.integers(1, 4)), draw(st.integers(1, 9)), draw(rngs)
    tokens, targets = rng.integers(config.vocab_size, size=(2, B, T))
    ignored = rng.random((B, T)) < draw(st.sampled_from([0, 0.3, 0.9]))
    ignored[rng.integers(B), rng.integers(T)] = False
    return tokens, np.where(ignored, IGNORED, targets)


def make_batch(config=SMALL, B=3, T=8, seed=1):
    return np.random.default_rng(seed).integers(config.vocab_size, size=(2, B, T))


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


# Workers.


@given(models(), st.data())
def test_number_of_workers_changes_nothing_beyond_rounding(model, data):
    batch = data.draw(batches(model.config))
    expected, expected_grads = model.loss_and_grads(*batch)
    terms = model.losses
    for workers in (2, 3):
        several = Mixtral(model.config, model.params, num_workers=workers)
        with mock.patch.object(module, "LEAST_PART", 1):
            assert len(several._split(batch[0])) == min(workers, len(batch[0]))
            loss, grads = several.loss_and_grads(*batch)
            assert_close(several.loss(*batch), model.loss(*batch), 1e-12)
        assert_close(loss, expected, 1e-12)
        for term, expected_term in zip(several.losses, terms):
            assert_close(term, expected_term, 1e-12)
        for name, grad in grads.items():
            assert_close(grad, expected_grads[name], 1e-12, floor=1.0)


@pytest.mark.parametrize("workers", [2, 3])
def test_part_without_a_counted_target_adds_its_balance_losses_only(workers, monkeypatch):
    monkeypatch.setattr(module, "LEAST_PART", 1)
    tokens, targets = make_batch()
    targets[1:] = IGNORED
    expected, expected_grads = make_model().loss_and_grads(tokens, targets)
    loss, grads = make_model(num_workers=workers).loss_and_grads(tokens, targets)
    assert_close(loss, expected, 1e-13)
    for name, grad in grads.items():
        assert_close(grad, expected_grads[name], 1e-12)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_same_seed_gives_the_same_bits(workers, monkeypatch):
    monkeypatch.setattr(module, "LEAST_PART", 1)
    runs = []
    for _ in range(2):
        model = Mixtral.init(SMALL, seed=5, num_workers=workers)
        loss, grads = model.loss_and_grads(*make_batch())
        runs.append([loss, model(make_batch()[0]), *model.params.values(), *grads.values()])
    assert all(map(np.array_equal, *runs))
    other = Mixtral.init(SMALL, seed=6).params
    assert not any(np.array_equal(other[name], p) for name, p in model.params.items() if p.ndim > 1)


def test_small_batches_are_not_cut():
    model = make_model(num_workers=3)
    assert len(model._split(make_batch()[0])) == 1


# Logits.


@given(models(), st.data())
def test_a_token_changes_no_logits_before_it(model, data):
    tokens, _ = data.draw(batches(model.config))
    assume(model.config.vocab_size > 1)
    t = data.draw(st.integers(0, tokens.shape[1] - 1))
    other = tokens.copy()
    other[:, t] = (other[:, t] + 1) % model.config.vocab_size
    before, after = model(tokens), model(other)
    assert_close(after[:, :t], before[:, :t], 1e-12)
    assert (after[:, t] != before[:, t]).any(axis=1).all()


@pytest.mark.parametrize("window", [1, 2, 4])
def test_one_layer_sees_its_window_and_no_further(window):
    model = make_model(dataclasses.replace(SMALL, n_layers=1, sliding_window=window))
    tokens, _ = make_batch(B=1)
    other = tokens.copy()
    other[0, 2] = (other[0, 2] + 1) % 7
    moved = np.abs(model(other) - model(tokens)).max(axis=(0, 2)) > 1e-9
    assert np.flatnonzero(moved).tolist() == list(range(2, 2 + window))


@given(models(), st.data())
def test_rows_of_a_batch_do_not_see_each_other(model, data):
    tokens, _ = data.draw(batches(model.config))
    together = model(tokens)
    assert together.shape == (*tokens.shape, model.config.vocab_size)
    for row, logits in zip(tokens, together):
        assert_close(model(row[None])[0], logits, 1e-12)


def test_only_the_relative_position_matters():
    model, (tokens, _) = make_model(dataclasses.replace(SMALL, sliding_window=2, n_layers=1)), make_batch(B=1)
    assert_close(model(tokens[:, 3:])[:, 1:], model(tokens)[:, 4:], 1e-12)  # each sees itself and the one before


@pytest.mark.parametrize("kind", ["int8", "uint8", "int32", "uint64"])
def test_integers_of_any_kind_are_tokens(kind):
    tokens, targets = make_batch()
    model = make_model()
    np.testing.assert_array_equal(model(tokens.astype(kind)), model(tokens))
    assert model.loss(tokens.astype(kind), targets.astype(kind)) == model.loss(tokens, targets)


def test_lists_are_tokens():
    tokens, targets = make_batch()
    model = make_model()
    np.testing.assert_array_equal(model(tokens.tolist()), model(tokens))
    assert model.loss(tokens.tolist(), targets.tolist()) == model.loss(tokens, targets)


# Initial weights.


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_initial_weights_have_the_standard_deviation_that_is_promised(dtype):
    model = Mixtral.init(MixtralConfig.tiny(), dtype=dtype)
    assert model.dtype == dtype
    assert list(model.params) == [name for name, _ in model.config.parameter_shapes()]
    for name, p in model.params.items():
        assert p.dtype == dtype
        if name.endswith("norm"):
            assert (p == 1).all()
        else:
            expected = 0.02 / math.sqrt(4) if name.endswith(("wo", "w2")) else 0.02
            assert p.std() == pytest.approx(expected, rel=0.1)
            assert abs(p.mean()) < 0.1 * expected


def test_fresh_model_knows_nothing():
    model = Mixtral.init(MixtralConfig.tiny())
    assert model.loss(*make_batch(model.config, T=64)) == pytest.approx(math.log(256), rel=0.01)


# What is refused.


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"norm": None}, "parameter norm is missing"),
        ({"layers.1.moe.gate": None}, "parameter layers.1.moe.gate is missing"),
        ({"layers.2.moe.gate": np.ones((4, 6))}, "parameter layers.2.moe.gate does not belong"),
        ({"output": np.ones((6, 7))}, r"parameter output has shape \(6, 7\); the config asks for \(7, 6\)"),
    ],
)
def test_parameters_that_do_not_fit_the_config_are_refused(changed, says):
    params = {name: p for name, p in (make_model().params | changed).items() if p is not None}
    with pytest.raises(InputError, match=says):
        Mixtral(SMALL, params)


@pytest.mark.parametrize(("name", "dtype"), [("output", "float32"), ("norm", "float16"), ("output", "int64")])
def test_parameters_of_several_dtypes_are_refused(name, dtype):
    params = make_model().params
    with pytest.raises(InputError, match="dtype"):
        Mixtral(SMALL, params | {name: params[name].astype(dtype)})


def test_unknown_backends_and_dtypes_are_refused():
    with pytest.raises(InputError, match="no backend 'abacus'; there is reference"):
        Mixtral.init(SMALL, backend="abacus")
    with pytest.raises(InputError, match="'float16' is not one to compute in"):
        Mixtral.init(SMALL, dtype="float16")


def test_negative_numbers_of_workers_are_refused():
    with pytest.raises(InputError, match="workers"):
        make_model(num_workers=-1).loss(*make_batch())


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        ([[0, 7]], "token 7 is outside the vocabulary of 7"),
        ([[0, -1]], "token -1 is outside"),
        ([[0.0, 1.0]], "tokens must be integers"),
        ([[True]], "tokens must be integers"),
        ([0, 1], "of shape"),
        ([[[0]]], "of shape"),
        (np.empty((2, 0), int), "of shape"),
        (np.empty((0, 2), int), "of shape"),
        ([["a"]], "tokens must be integers"),
    ],
)
def test_tokens_that_are_none_are_refused(tokens, says):
    targets = np.zeros(np.shape(tokens), int)
    for use in (lambda m: m(tokens), lambda m: m.loss(tokens, targets), lambda m: m.loss_and_grads(tokens, targets)):
        with pytest.raises(InputError, match=says):
            use(make_model())


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        ([[0, 7]], "token 7 is outside the vocabulary of 7"),
        ([[0, -1]], "token -1 is outside"),
        ([[0, -101]], "token -101 is outside"),
        ([[0, 2**63]], "outside the vocabulary"),
        ([[0.0, 1.0]], "targets must be integers"),
        ([[0]], r"of the tokens' shape \(1, 2\)"),
        ([0, 1], r"of the tokens' shape \(1, 2\)"),
        ([[IGNORED, IGNORED]], "every target is -100"),
    ],
)
def test_targets_that_are_none_are_refused(targets, says):
    targets = np.array(targets, np.uint64 if targets == [[0, 2**63]] else None)
    for use in (Mixtral.loss, Mixtral.loss_and_grads):
        with pytest.raises(InputError, match=says):
            use(make_model(), np.array([[0, 1]]), targets)


@pytest.mark.parametrize("name", ["layers.1.moe.gate", "layers.1.attention.wq"])
def test_a_layer_whose_router_is_not_finite_is_named(name):
    model = make_model()
    model.params[name][0, 0] = np.nan
    with np.errstate(invalid="ignore"):
        with pytest.raises(FloatingPointError, match="layer 1: the router's logits are not finite"):
            model.loss_and_grads(*make_batch())
        assert model.first_layer_not_finite(make_batch()[0]) == 1
    assert make_model().first_layer_not_finite(make_batch()[0]) is None


def test_first_layer_that_overflows_is_found_in_a_dense_model():
    model = make_model(dataclasses.replace(SMALL, **VARIANTS["dense"]))
    model.params["layers.0.ffn.w2"][:] = np.inf
    with np.errstate(invalid="ignore"):
        assert model.first_layer_not_finite(make_batch()[0]) == 0
