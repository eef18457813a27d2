"""The model on kernels: the same losses, gradients and texts as on the reference, training included."""

from dataclasses import replace

import numpy as np
import pytest
from emulation import EVERYWHERE, orders, running
from gradients import assert_close
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import configs, random_params, rngs

from tinymoe import InputError, Mixtral, MixtralConfig, generate
from tinymoe.cuda import device

CONFIG = MixtralConfig(
    dim=16,
    n_layers=2,
    head_dim=4,
    hidden_dim=24,
    n_heads=4,
    n_kv_heads=2,
    context_len=64,
    vocab_size=40,
    num_experts=4,
    top_k_experts=2,
    aux_loss_coef=0.02,
    z_loss_coef=0.01,
)
TEXT = np.random.default_rng(0).integers(0, 40, (2, 18))
TOKENS, TARGETS = TEXT[:, :-1], TEXT[:, 1:]


def margin(model, tokens):
    """Return by how much a routing is decided: where it is less than rounding, two backends may choose differently."""
    gaps = [np.inf]
    for logits in model.router_logits(tokens):
        ordered = np.sort(logits, axis=1)[:, ::-1]
        k = model.config.top_k_experts
        if k < ordered.shape[1]:
            gaps.append((ordered[:, k - 1] - ordered[:, k]).min())
    return min(gaps)


@pytest.mark.parametrize("where", EVERYWHERE)
@given(configs(), st.integers(1, 3), st.integers(1, 9), orders, rngs)
@settings(max_examples=8)
def test_losses_gradients_and_logits_equal_the_reference(where, config, B, T, order, rng):
    T = min(T, config.context_len)
    params = random_params(config, rng, np.float32)
    reference = Mixtral(config, params, num_workers=1)
    tokens, targets = rng.integers(0, config.vocab_size, (2, B, T))
    targets[0, 0] = -100 if targets.size > 1 else targets[0, 0]
    assume(margin(reference, tokens) > 1e-4)
    loss, grads = reference.loss_and_grads(tokens, targets)
    with running(where, order):  # both in float32, and a norm of one or two elements magnifies the rounding of either
        model = Mixtral(config, params, backend="cuda")
        assert_close(model(tokens), reference(tokens), 1e-4)
        found, found_grads = model.loss_and_grads(tokens, targets)
        assert_close(found, loss, 1e-4)
        assert list(found_grads) == list(grads)
        largest = max(np.linalg.norm(grad) for grad in grads.values())
        for name, grad in grads.items():
            assert_close(model.host(found_grads[name]), grad, 1e-4, floor=0.1 * largest)
        for term, expected in zip(model.losses, reference.losses):
            assert_close(term, expected, 1e-4)
        assert_close(model.loss(tokens, targets), reference.loss(tokens, targets), 1e-4)


@pytest.mark.parametrize("where", EVERYWHERE)
def test_training_gives_the_reference_s_losses(where):
    reference = Mixtral.init(CONFIG, num_workers=1)
    optimizer = reference.ops.AdamW(reference.params, learning_rate=1e-2)
    with running(where, ("shuffled", 1, 0)):
        model = Mixtral.init(CONFIG, backend="cuda")
        there = model.ops.AdamW(model.params, learning_rate=1e-2)
        for _ in range(4):
            expected, grads = reference.loss_and_grads(TOKENS, TARGETS)
            optimizer.step(grads)
            loss, grads = model.loss_and_grads(TOKENS, TARGETS)
            there.step(grads)
            assert_close(loss, expected, 1e-4)
    assert expected < 4.0 - 0.5


@pytest.mark.parametrize("where", EVERYWHERE)
def test_bfloat16_trains_with_float32_masters(where):
    with running(where, ("forward", 0, 0)):
        model = Mixtral.init(CONFIG, backend="cuda", dtype="bfloat16")
        optimizer = model.ops.AdamW(model.params, learning_rate=1e-2)
        losses = []
        for _ in range(6):
            loss, grads = model.loss_and_grads(TOKENS, TARGETS)
            assert all(grad.dtype == device.BFLOAT16 for grad in grads.values())
            optimizer.step(grads)
            losses.append(loss)
        exact = Mixtral.init(CONFIG, num_workers=1)
        assert_close(losses[0], exact.loss_and_grads(TOKENS, TARGETS)[0], 1e-2)
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize("window", [None, 6])
def test_generation_over_the_cache_writes_what_the_reference_writes(where, window):
    config = replace(CONFIG, sliding_window=window)
    params = random_params(config, np.random.default_rng(3), np.float32)
    prompts = [TOKENS[0, :5], TOKENS[1, :9]]
    with running(where, ("forward", 0, 0)):
        model, reference = Mixtral(config, params, backend="cuda"), Mixtral(config, params)
        for text, expected in zip(generate(model, prompts, 12), generate(reference, prompts, 12), strict=True):
            np.testing.assert_array_equal(text, expected)


@pytest.mark.parametrize("where", EVERYWHERE)
def test_a_checkpoint_goes_there_and_back(where, tmp_path):
    with running(where, ("forward", 0, 0)):
        model = Mixtral.init(CONFIG, backend="cuda")
        model.save_pretrained(tmp_path)
        again = Mixtral.from_pretrained(tmp_path, backend="cuda")
        for name, p in model.params.items():
            np.testing.assert_array_equal(model.host(again.params[name]), model.host(p))
        half = Mixtral.from_pretrained(tmp_path, backend="cuda", dtype="bfloat16")
        assert half.params["norm"].dtype == device.BFLOAT16
        assert_close(half(TOKENS).astype(np.float64), model(TOKENS), 3e-2)


@pytest.mark.parametrize("where", EVERYWHERE)
def test_weights_that_are_not_finite_are_found_with_their_layer(where):
    params = random_params(CONFIG, np.random.default_rng(0), np.float32)
    params["layers.1.attention.wo"][0, 0] = np.inf
    with running(where, ("forward", 0, 0)), pytest.raises(FloatingPointError, match="layer 1: the router's logits"):
        Mixtral(CONFIG, params, backend="cuda").loss_and_grads(TOKENS, TARGETS)


def test_dtypes_that_no_kernel_has_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"float64.*float32 or bfloat16"):
        Mixtral.init(CONFIG, backend="cuda", dtype="float64")
    Mixtral.init(CONFIG).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="without mmap"):
        Mixtral.from_pretrained(tmp_path, backend="cuda", mmap=True)
