"""The model's log-probabilities by brute force, and the gradients of any loss on them by differences."""

import dataclasses
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
from emulation import EVERYWHERE
from gradients import assert_close, check_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SMALL, configs, make_model, random_params, rngs

import tinymoe.model as model_module
from tinymoe import InputError, Mixtral, instruct
from tinymoe.cuda import device
from tinymoe.examples import Example, padded, pairs
from tinymoe.reference.loss import IGNORED


@st.composite
def sequences(draw, vocab_size, most=6):
    """Draw prompts and answers of any lengths."""
    rng = draw(rngs)
    sizes = draw(st.lists(st.tuples(st.integers(1, most), st.integers(1, most)), min_size=1, max_size=4))
    return [tuple(rng.integers(vocab_size, size=n) for n in pair) for pair in sizes]


def some_pairs(vocab_size=7, count=3, seed=1):
    rng = np.random.default_rng(seed)
    examples = [
        Example(rng.integers(vocab_size, size=2 + i), tuple(rng.integers(vocab_size, size=(2, 1 + i))))
        for i in range(count)
    ]
    return pairs(examples, rng.normal(-3, 1, (2, count)))


@given(configs(), st.data())
@settings(max_examples=15)
def test_log_probability_of_an_answer_is_that_of_its_tokens_one_after_another(config, data):
    model = Mixtral(config, random_params(config, data.draw(rngs)), num_workers=1)
    given_ones = data.draw(sequences(config.vocab_size))
    found = model.log_probs(*padded(given_ones)[:2])
    for (prompt, answer), log_prob in zip(given_ones, found):
        text, expected = list(prompt), 0.0
        for token in answer:
            logits = model(np.array([text]))[0, -1]
            expected += logits[token] - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
            text.append(token)
        assert_close(log_prob, expected, 1e-10, floor=1.0)


def assert_gradients_are_differences(model, batch, loss_of, **how):
    """Compare gradients through `log_probs_and_backward` with differences of a loss, balance losses included.

    ``loss_of`` takes log-probabilities and gives the loss and its gradient by them.
    """
    names, loads = list(model.params), []

    def loss_and_grads(model):
        log_probs, backward = model.log_probs_and_backward(*batch[:3])
        loss, dlog_probs = loss_of(log_probs)
        grads = backward(dlog_probs)
        loads.append(model.losses.load)
        config, terms = model.config, model.losses
        balance = config.aux_loss_coef * terms.switch.sum() + config.z_loss_coef * terms.z.sum()
        return loss + balance / len(config.moe_layers), grads

    def loss(*arrays):
        return loss_and_grads(Mixtral(model.config, dict(zip(names, arrays)), num_workers=1))[0]

    grads = loss_and_grads(model)[1]
    check_gradients(loss, [model.params[name] for name in names], [grads[name] for name in names], **how)
    assert all(np.array_equal(load, loads[0]) for load in loads), "a step changed a token's experts: another seed"


@pytest.mark.parametrize("changes", [{}, dict(moe_every=2), dict(tie_embeddings=True, sliding_window=2)])
def test_gradient_of_any_loss_on_log_probabilities_equals_differences(changes):
    weights = np.array([0.7, -1.3, 0.0, 2.0, 0.1, -0.4])
    model = make_model(dataclasses.replace(SMALL, **changes))
    assert_gradients_are_differences(model, some_pairs(), lambda log_probs: (weights @ log_probs, weights), full=12)


@pytest.mark.parametrize("beta", [0.1, 3.0])
def test_gradient_of_dpo_through_the_model_equals_differences(beta):
    batch = some_pairs()

    def loss_of(log_probs):
        loss, saved = instruct.dpo_loss(log_probs.reshape(2, -1), batch.references, beta)
        return loss, instruct.dpo_loss_backward(1.0, saved).ravel()

    assert_gradients_are_differences(make_model(), batch, loss_of, full=12)


def test_gradient_of_the_mean_log_probability_is_that_of_the_cross_entropy():
    batch, model = some_pairs(), make_model()
    count = np.count_nonzero(batch.targets != IGNORED)
    log_probs, backward = model.log_probs_and_backward(*batch[:3])
    grads = backward(np.full(len(log_probs), -1 / count))
    loss, expected = model.loss_and_grads(batch.inputs, batch.targets, lengths=batch.lengths)
    assert_close(model.losses.cross_entropy, -log_probs.sum() / count, 1e-12)
    assert loss > model.losses.cross_entropy
    for name, grad in grads.items():
        assert_close(grad, expected[name], 1e-12)


def test_log_probabilities_are_without_noise_and_capacity_so_that_a_policy_starts_at_its_reference():
    batch = some_pairs()
    varied = dataclasses.replace(SMALL, router_jitter=0.3, noisy_top_k=True, capacity_factor=0.5)
    model = make_model(varied)
    log_probs, backward = model.log_probs_and_backward(*batch[:3])
    assert_close(log_probs, model.log_probs(*batch[:2]), 1e-13)
    grads = backward(np.ones(len(log_probs)))
    assert list(grads) == list(model.params)
    for name, grad in grads.items():
        assert grad.any() != name.endswith("moe.noise"), name


@pytest.mark.parametrize("fill", [0, 5])
def test_padding_has_no_part_in_losses_gradients_and_load(fill):
    model = make_model()
    tokens, targets = np.random.default_rng(0).integers(7, size=(2, 1, 5))
    expected_loss, expected = model.loss_and_grads(tokens, targets)
    terms = model.losses
    longer = np.concatenate([tokens, np.full((1, 4), fill)], axis=1)
    ignored = np.concatenate([targets, np.full((1, 4), IGNORED)], axis=1)
    loss, grads = model.loss_and_grads(longer, ignored, lengths=[5])
    assert_close(loss, expected_loss, 1e-13)
    for term, expected_term in zip(model.losses, terms):
        assert_close(term, expected_term, 1e-13)
    for name, grad in grads.items():
        assert_close(grad, expected[name], 1e-12)
    assert_close(model.log_probs(longer, ignored), model.log_probs(tokens, targets), 1e-13)
    counted, _ = model.loss_and_grads(longer, ignored)
    assert abs(counted - loss) > 1e-3, "without the lengths, padding counts in the balance losses"


def test_each_sequence_has_a_length_of_its_own():
    tokens, targets = np.random.default_rng(0).integers(7, size=(2, 2, 9))
    targets[0, 5:] = IGNORED
    found = []
    for fill in (0, 5):
        tokens[0, 5:] = fill
        model = make_model()
        loss, grads = model.loss_and_grads(tokens, targets, lengths=[5, 9])
        found.append([loss, model.losses.load, *grads.values()])
    for one, other in zip(*found):
        assert_close(one, other, 1e-13)


@pytest.mark.parametrize("lengths", [[0, 5], [5, 6], [5], [[5, 5]]])
def test_lengths_out_of_range_are_refused(lengths):
    tokens = np.zeros((2, 5), int)
    with pytest.raises(InputError, match="lengths must be 2 numbers from 1 to 5"):
        make_model().loss_and_grads(tokens, tokens, lengths=lengths)


@pytest.mark.parametrize("workers", [2, 3, 5])
def test_number_of_workers_changes_nothing_beyond_rounding(workers):
    batch, weights = some_pairs(), np.arange(6.0)
    log_probs, backward = make_model().log_probs_and_backward(*batch[:3])
    expected = backward(weights)
    with mock.patch.object(model_module, "LEAST_PART", 1):
        several, backward = make_model(num_workers=workers).log_probs_and_backward(*batch[:3])
        grads = backward(weights)
    assert_close(several, log_probs, 1e-13)
    for name, grad in grads.items():
        assert_close(grad, expected[name], 1e-12)


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 6e-2)])
def test_kernels_give_the_reference_s_log_probabilities_and_gradients(where, dtype, tolerance):
    config = dataclasses.replace(SMALL, num_experts=2)  # top-2 of 2: rounding cannot change a choice
    drawn = random_params(config, np.random.default_rng(0)).items()
    params = {name: p.astype(ml_dtypes.bfloat16).astype(np.float32) for name, p in drawn}
    batch, weights = some_pairs(), np.array([1.0, 2.0, 0.5, -1.0, -2.0, 0.25])
    log_probs, backward = Mixtral(config, params, num_workers=1).log_probs_and_backward(*batch[:3])
    expected = backward(weights)
    with device.using(where):
        model = Mixtral(config, {name: p.astype(dtype) for name, p in params.items()}, backend="cuda")
        found, backward = model.log_probs_and_backward(*batch[:3])
        assert_close(found, log_probs, tolerance)
        assert_close(model.log_probs(*batch[:2]), log_probs, tolerance)
        grads, largest = backward(weights), max(np.linalg.norm(grad) for grad in expected.values())
        for name, grad in expected.items():
            assert_close(model.host(grads[name]), grad, tolerance, floor=0.3 * largest)
