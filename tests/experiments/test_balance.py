"""Collapse and its remedies: the command runs, wrong losses are wrong as described, measures are what they say."""

import json

import numpy as np
import pytest
from gradients import assert_close, slope

from tinymoe import Mixtral, cli
from tinymoe.experiments import balance
from tinymoe.experiments.learning import micro
from tinymoe.reference import expert_load
from tinymoe.reference.loss import IGNORED
from tinymoe.reference.router import top_k_ids


@pytest.fixture(scope="module")
def losses():
    return balance.wrong_losses(seed=0)


def test_quick_mode_writes_numbers_and_figure(tmp_path):
    assert cli.main(["experiment", "balance", "--quick", "--out", str(tmp_path)]) == 0
    numbers = json.loads((tmp_path / "balance.json").read_text())["numbers"]
    assert set(numbers["methods"]) == set(balance.METHODS)
    for name, lines in numbers["methods"].items():
        assert [line["step"] for line in lines] == [1, 2, 4]
        assert np.shape(lines[-1]["load"]) == (2, 8)
        assert np.allclose(np.sum(lines[-1]["load"], axis=1), 1, atol=1e-4)
        assert any(lines[-1]["dropped"]) == (name == "capacity 1.25")
    assert (tmp_path / "balance.png").read_bytes().startswith(b"\x89PNG")


def test_head_start_makes_two_experts_the_only_ones_that_matter():
    model = Mixtral.init(micro())
    before = {name: p.copy() for name, p in model.params.items()}
    balance._give_head_start(model.params)
    for name, p in model.params.items():
        if name.endswith(("w1", "w2", "w3")):
            np.testing.assert_array_equal(p[:2], before[name][:2])
            assert_close(p[2:], 0.01 * before[name][2:], 1e-6)
        else:
            np.testing.assert_array_equal(p, before[name])


def test_measures_are_those_of_the_routing_of_all_but_the_padding():
    model = Mixtral.init(micro(top_k_experts=3), seed=3)
    texts = [np.random.default_rng(i).integers(0, 256, (2, 11)) for i in range(2)]
    windows = [(text[:, :-1], text[:, 1:].copy()) for text in texts]
    windows[1][1][1, 4:] = IGNORED
    found = balance.measure(model, windows, {})
    real = np.ones(40, bool)
    real[34:] = False
    for layer in range(2):
        routed = [model.routing(inputs)[layer] for inputs, _ in windows]
        experts = np.concatenate([experts for _, experts, _ in routed])[real]
        counts = np.bincount(experts.ravel(), minlength=8)
        assert_close(found["load"][layer], counts / (3 * 34), 1e-4)
        assert found["busiest"][layer] == pytest.approx(8 * counts.max() / (3 * 34), abs=1e-3)
        first = sorted(np.bincount(experts[:, 0], minlength=8))[-2:]
        assert found["captured"][layer] == pytest.approx(sum(first) / 34, abs=1e-3)
        p = np.exp(np.concatenate([logits for *_, logits in routed])[real].astype(float))
        p /= p.sum(axis=1, keepdims=True)
        assert found["entropy"][layer] == pytest.approx(-(p * np.log(p)).sum(axis=1).mean(), abs=1e-3)
    losses = [model.loss(*window) for window in windows]
    assert found["val_loss"] == pytest.approx((20 * losses[0] + 14 * losses[1]) / 34, abs=1e-4)


@pytest.mark.parametrize("name", balance.LOSSES)
def test_gradient_of_each_loss(name):
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((7, 4))
    load = expert_load(top_k_ids(logits, 2), 4)
    _, dlogits = balance.LOSSES[name](logits, load)
    for _ in range(3):
        way = rng.standard_normal(logits.shape)
        steep = slope(lambda h, way=way: balance.LOSSES[name](logits + h * way, load)[0])
        assert_close(np.sum(dlogits * way), steep, 1e-7, floor=1.0)


def test_load_of_positive_probabilities_is_blind(losses):
    for of_state in losses.values():
        found = of_state["load = probs > 0"]
        assert found["value"] == pytest.approx(8)  # E
        assert found["gradient"] < 1e-12
        assert found["busiest_after"] == found["busiest_before"]


def test_variance_takes_confident_collapse_for_balance_and_makes_it_no_better(losses):
    balanced, collapsed = (
        losses[state]["variance of probs"] for state in ("balanced, confident", "collapsed, confident")
    )
    assert balanced["value"] == pytest.approx(collapsed["value"], rel=0.2)
    assert collapsed["busiest_after"] >= collapsed["busiest_before"] > 3
    uniform = losses["collapsed, nearly uniform"]["variance of probs"]
    assert uniform["value"] < 1e-3, "all but perfect, it says"
    assert uniform["busiest_after"] > 2


def test_switch_loss_tells_them_apart_and_balances_each(losses):
    values = [of_state["Switch loss"]["value"] for of_state in losses.values()]
    assert values[0] == pytest.approx(1, abs=0.01)
    assert values[1] > 3
    assert values[2] > 1.1
    assert all(of_state["Switch loss"]["busiest_after"] < 1.05 for of_state in losses.values())


def test_unknown_experiment_is_refused(capsys):
    assert cli.main(["experiment", "alchemy"]) == 2
    assert "no experiment 'alchemy'; there is balance" in capsys.readouterr().err
