"""A mixture against dense models: equal where it says equal, and its margins are differences of the same seed."""

import json

import pytest

from tinymoe import MixtralConfig, cli
from tinymoe.experiments import dense
from tinymoe.scale.footprint import training_flops


def configs():
    base = MixtralConfig.tiny(n_layers=3)
    return base, {name: MixtralConfig(**{**vars(base), **changes}) for name, changes in dense.shapes(base).items()}


def test_models_have_as_many_parameters_as_they_say():
    base, models = configs()
    router = base.n_layers * base.dim * base.num_experts
    active, total = models["dense, as many active"], models["dense, as many in all"]
    assert active.count_parameters() == base.count_active_parameters() - router
    assert total.count_parameters() == base.count_parameters() - router
    assert training_flops(active, 128) == pytest.approx(training_flops(base, 128), rel=0.02)


def test_granularity_changes_neither_parameters_nor_flops_but_the_routers():
    base, _ = configs()
    for name in ("twice the experts, half the size", "half the experts, twice the size"):
        config = MixtralConfig(**{**vars(base), **dense.ablations(base)[name]})
        assert config.count_parameters() == pytest.approx(base.count_parameters(), rel=0.01)
        assert config.count_active_parameters() == pytest.approx(base.count_active_parameters(), rel=0.01)
        assert config.num_experts != base.num_experts


def test_margins_are_of_the_same_seed():
    compared = {
        name: [{"curve": [{"val_loss": 9.0}, {"val_loss": loss}]} for loss in losses]
        for name, losses in {"mixture": [1.0, 1.1], "a": [1.3, 1.2], "b": [0.9, 1.1]}.items()
    }
    found = dense.margins(compared)
    assert found["below"] == {"a": pytest.approx([0.3, 0.1]), "b": pytest.approx([-0.1, 0.0])}
    assert found["spread"] == pytest.approx(0.2)


def test_quick_mode_writes_numbers_and_figure(tmp_path):
    assert cli.main(["experiment", "dense", "--quick", "--out", str(tmp_path)]) == 0
    numbers = json.loads((tmp_path / "dense.json").read_text())["numbers"]
    assert set(numbers["compared"]) == set(numbers["margins"]["last_losses"])
    for runs in numbers["compared"].values():
        (one,) = runs
        assert [line["step"] for line in one["curve"]] == [2, 4]
        assert one["curve"][1]["flop"] == 2 * one["curve"][0]["flop"] > 0
    for times in numbers["seconds"].values():
        assert times["step"] > 0
        assert times["token"] > 0
    assert (tmp_path / "dense.png").read_bytes().startswith(b"\x89PNG")
