"""The model: what its logits depend on, its initial weights, and what it refuses."""

import dataclasses
import math

import numpy as np
import pytest
from gradients import assert_close
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import SMALL, batches, make_batch, make_model, models

from tinymoe import InputError, Mixtral, MixtralConfig
from tinymoe.reference.loss import IGNORED

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
    model = make_model(dataclasses.replace(SMALL, num_experts=0, top_k_experts=0))
    model.params["layers.0.ffn.w2"][:] = np.inf
    with np.errstate(invalid="ignore"):
        assert model.first_layer_not_finite(make_batch()[0]) == 0
