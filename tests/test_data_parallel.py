"""A batch that is cut over workers gives what it gives whole, and the same bits each time."""

from unittest import mock

import numpy as np
import pytest
from gradients import assert_close
from hypothesis import given
from hypothesis import strategies as st
from strategies import SMALL, batches, make_batch, make_model, models

import tinymoe.model as module
from tinymoe import Mixtral
from tinymoe.reference.loss import IGNORED


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
