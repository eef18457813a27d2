"""`tinymoe plan`: exact counts, the published figures, and what follows from them."""

import io
import itertools
import json
import math
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from strategies import configs, varied_configs

from tinymoe import MixtralConfig
from tinymoe.config import PRESETS, load_config
from tinymoe.errors import InputError
from tinymoe.scale import devices, footprint
from tinymoe.scale.devices import DEVICES, HERE, Device, find_device
from tinymoe.scale.plan import as_dict, command, make_plan, place
from tinymoe.scale.tables import render

BIG = MixtralConfig.mixtral_8x7b()
MACHINE = Device("this machine", 16 * 10**9, 20e9, 100e9, 100e9, "measured")
# Which part every parameter belongs to, by the last word of its name.
PART_OF = {
    "tok_embeddings": "embedding",
    "output": "output_head",
    **dict.fromkeys(("gate", "noise", "bias"), "router"),
    **dict.fromkeys(("wq", "wk", "wv", "wo"), "attention"),
    **dict.fromkeys(("w1", "w2", "w3"), "feed_forward"),
    **dict.fromkeys(("norm", "attention_norm", "ffn_norm"), "norms"),
}


@given(varied_configs())
def test_every_parameter_is_in_exactly_one_part(config):
    counted = dict.fromkeys(PART_OF.values(), 0)
    for name, shape in config.parameter_shapes():
        counted[PART_OF[name.rpartition(".")[2]]] += math.prod(shape)
    parts = footprint.count_parts(config)
    assert {name: getattr(parts, name).total for name in counted} == counted
    assert parts.total == sum(counted.values()) == config.count_parameters()
    assert parts.active == config.count_active_parameters()
    assert all(
        part.each * part.copies == part.total for part in vars(parts).values() if isinstance(part, footprint.Part)
    )


def test_mixtral_8x7b_has_the_published_figures():
    parts = footprint.count_parts(BIG)
    assert (parts.total, parts.active) == (46_702_792_704, 12_879_925_248)
    assert parts.attention.each == 41_943_040
    assert parts.router.total == 1_048_576
    assert parts.feed_forward.each == 176_160_768
    assert parts.feed_forward.copies == 8 * 32
    assert round(32 * parts.feed_forward.each / 1e9, 2) == 5.64
    assert round(parts.feed_forward.total / 1e9, 2) == 45.10
    assert round((parts.total - parts.feed_forward.total) / 1e9, 2) == 1.61
    assert round(parts.active / parts.total, 3) == 0.276
    assert round(parts.total / parts.active, 2) == 3.63
    assert round(footprint.weight_bytes(BIG, "bf16") / 1e9, 1) == 93.4
    assert footprint.weight_bytes(BIG, "fp32") == 4 * parts.total


def test_mixtral_8x22b_has_140_620_634_112_parameters():
    assert make_plan(MixtralConfig.mixtral_8x22b()).parameters.total == 140_620_634_112


@pytest.mark.parametrize(("batch", "gigabytes"), [(1, 4.29), (8, 34.36)])
def test_cache_of_8x7b_at_32k(batch, gigabytes):
    assert round(footprint.kv_cache_bytes(BIG, batch, 32768, "bf16") / 1e9, 2) == gigabytes


def test_sliding_window_bounds_cache_and_attention():
    config = MixtralConfig.mistral_7b()
    for figure in (footprint.decode_flops, lambda c, t: footprint.kv_cache_bytes(c, 1, t, "bf16")):
        assert figure(config, 4095) < figure(config, 4096) == figure(config, 4097) == figure(config, 32768)


def test_decode_flops_of_tiny_counted_by_hand():
    attention = 64 * 64 + 32 * 64 + 32 * 64 + 64 * 64  # wq wk wv wo
    experts = 2 * 3 * 64 * 128
    products = 2 * (attention + 8 * 64 + experts) + 64 * 256  # two layers with routers, and the head
    scores_and_values = 2 * 4 * 2 * (10 * 16)  # layers, heads, one each; ten keys of 16
    assert footprint.decode_flops(MixtralConfig.tiny(), 10) == 2 * (products + scores_and_values)
    dense = MixtralConfig.tiny(num_experts=0, top_k_experts=0)
    assert footprint.decode_flops(dense, 10) == 2 * (products + scores_and_values - 2 * (8 * 64 + experts // 2))


def test_tied_head_multiplies_like_any_other():
    tied = MixtralConfig.tiny(tie_embeddings=True)
    assert footprint.decode_flops(tied, 7) == footprint.decode_flops(MixtralConfig.tiny(), 7)
    assert footprint.decode_bytes(tied, 2, 7, "bf16") == footprint.decode_bytes(MixtralConfig.tiny(), 2, 7, "bf16")


@given(configs())
def test_prefill_is_the_mean_of_decoding_every_position(config):
    T = config.context_len
    mean = sum(footprint.decode_flops(config, t) for t in range(1, T + 1)) / T
    assert footprint.prefill_flops(config, T) == pytest.approx(mean, rel=1e-12)
    assert footprint.training_flops(config, T) == pytest.approx(3 * mean, rel=1e-12)


@pytest.mark.parametrize(("E", "k", "B"), [(4, 2, 1), (4, 2, 2), (4, 1, 3), (3, 3, 2), (5, 2, 3)])
def test_experts_touched_is_the_mean_over_all_routings(E, k, B):
    routings = list(itertools.product(itertools.combinations(range(E), k), repeat=B))
    mean = sum(len(set().union(*routing)) for routing in routings) / len(routings)
    config = MixtralConfig.tiny(num_experts=E, top_k_experts=k)
    assert footprint.experts_touched(config, B) == pytest.approx(mean, rel=1e-12)


@given(configs(), st.integers(1, 50))
def test_experts_touched_grow_from_k_to_all(config, batch):
    touched = footprint.experts_touched(config, batch)
    E, k = (config.num_experts, config.top_k_experts) if config.num_experts else (1, 1)
    assert footprint.experts_touched(config, 1) == pytest.approx(k)
    assert touched <= footprint.experts_touched(config, batch + 1) <= E
    assert footprint.experts_touched(config, 10_000) == pytest.approx(E)


@given(configs(), st.sampled_from(["bf16", "fp32"]))
def test_one_sequence_reads_its_active_parameters_and_its_cache(config, dtype):
    T = config.context_len
    looked_up = 0 if config.tie_embeddings else config.vocab_size * config.dim
    weights = (config.count_active_parameters() - looked_up) * footprint.DTYPES[dtype]
    cache = footprint.kv_cache_bytes(config, 1, T, dtype)
    assert footprint.decode_bytes(config, 1, T, dtype) == pytest.approx(weights + cache, rel=1e-12)


@pytest.mark.parametrize("config", [MixtralConfig.mistral_7b(), BIG], ids=["dense", "experts"])
def test_one_sequence_in_bf16_computes_one_flop_per_byte(config):
    assert footprint.decode_intensity(config, 1, 1, "bf16") == pytest.approx(1, rel=0.01)
    assert footprint.decode_intensity(config, 1, 1, "fp32") == pytest.approx(0.5, rel=0.01)


def test_experts_need_a_larger_batch_than_a_dense_model_for_the_same_intensity():
    dense = MixtralConfig.mistral_7b()
    assert footprint.decode_intensity(BIG, 16, 1, "bf16") < 0.4 * footprint.decode_intensity(dense, 16, 1, "bf16")


@given(configs(), st.integers(1, 200), st.sampled_from([*footprint.DTYPES]), st.integers(1, 10**6))
def test_fits_and_devices_needed_and_largest_batch_agree(config, batch, dtype, memory_bytes):
    device = Device("toy", memory_bytes, 1e9, 1e9, 1e9, "datasheet")
    T = config.context_len
    placed = place(config, batch, T, dtype, device)
    needed = footprint.weight_bytes(config, dtype) + footprint.kv_cache_bytes(config, batch, T, dtype)
    assert placed.fits == (needed <= memory_bytes) == (batch <= placed.largest_batch)
    assert (placed.devices_needed - 1) * memory_bytes < needed <= placed.devices_needed * memory_bytes
    assert placed.free_bytes == memory_bytes - needed


def test_larger_batches_give_more_tokens_until_they_are_bound_by_compute():
    batches = [4**power for power in range(8)]
    placed = [place(BIG, batch, 1, "bf16", DEVICES["h200"]) for batch in batches]
    rates = [placement.tokens_per_second for placement in placed]
    assert rates == sorted(rates)
    assert (placed[0].bound_by, placed[-1].bound_by) == ("bandwidth", "compute")
    assert all(p.tokens_per_second == min(p.bandwidth_bound, p.compute_bound) for p in placed)


def test_ceiling_of_8x7b_on_an_h200_by_hand():
    placed = place(BIG, 1, 1, "bf16", DEVICES["h200"])
    read = 2 * (12_879_925_248 - 131_072_000) + 131_072
    assert placed.tokens_per_second == pytest.approx(4.8e12 / read)
    assert placed.compute_bound == pytest.approx(989e12 / footprint.decode_flops(BIG, 1))


def test_what_does_not_fit_is_placed_on_several_at_their_joint_bandwidth():
    one, several = (place(BIG, 1, 1, "bf16", DEVICES[name]) for name in ("h200", "a100-40gb"))
    assert (one.devices_needed, several.devices_needed) == (1, 3)
    assert several.bandwidth_bound / one.bandwidth_bound == pytest.approx(3 * 1.555 / 4.8)


def test_float32_is_bound_by_float32_arithmetic():
    half, single = (place(BIG, 1, 1, dtype, DEVICES["h200"]) for dtype in ("fp16", "fp32"))
    assert single.compute_bound / single.devices_needed == pytest.approx(half.compute_bound * 67 / 989)


def test_planning_the_largest_model_allocates_next_to_nothing():
    tracemalloc.start()
    make_plan(MixtralConfig.mixtral_8x22b(), batch=64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"batch": 0}, "batch is 0"),
        ({"batch": 2**31}, "less than 2³¹"),
        ({"context": 0}, "this model takes 1 to 32768 tokens"),
        ({"context": 32769}, "this model takes 1 to 32768 tokens"),
        ({"dtype": "int3"}, "bf16, fp16, fp32"),
        ({"device": "abacus"}, "h200, h100, a100-80gb, a100-40gb, here"),
    ],
)
def test_impossible_wishes_are_refused_in_one_line_before_anything_is_measured(values, says, monkeypatch):
    monkeypatch.setattr(devices, "measure_this_machine", lambda: pytest.fail("measured"))
    wishes = {"batch": 1, "context": None, "dtype": "bf16", "device": HERE, "as_json": False} | values
    with pytest.raises(InputError, match=says) as refused:
        command(BIG, **wishes)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("batch", [1, 8, 10**9])
@pytest.mark.parametrize("preset", PRESETS)
def test_tables_fit_80_columns_without_breaking_a_row(preset, batch):
    plan = make_plan(load_config(preset), batch=batch, devices=[*DEVICES.values(), MACHINE])
    console = Console(width=80, file=io.StringIO())
    console.print(render(plan))
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    for placement in plan.placements:
        (row,) = [line for line in lines if line.strip().startswith(placement.device.name)]
        assert row.rstrip().endswith(placement.bound_by)
    (row,) = [line for line in lines if "all parts" in line]
    assert f"{plan.parameters.total:,}" in row
    assert f"{plan.parameters.active:,}" in row
    figures = lines[next(i for i, line in enumerate(lines) if "memory and work" in line) + 2 :]
    assert all(figures[:8]), "the eight figures take a line each"
    assert not figures[8].strip()


def test_parts_that_a_model_does_not_have_get_no_row(capsys):
    dense = MixtralConfig.mistral_7b(tie_embeddings=True)
    for config, shown in ((dense, False), (BIG, True)):
        command(config, batch=1, context=None, dtype="bf16", device="h200", as_json=False)
        text = capsys.readouterr().out
        assert all((word in text) == shown for word in ("router", "output head", "experts"))


def test_printed_plan_names_the_devices_asked_for(capsys, monkeypatch):
    monkeypatch.setattr(devices, "measure_this_machine", lambda: MACHINE)
    for device, shown in ((None, ["H200", "A100 40GB", "this machine"]), (HERE, ["this machine"]), ("h100", ["H100"])):
        command(BIG, batch=1, context=None, dtype="bf16", device=device, as_json=False)
        text = capsys.readouterr().out
        assert all(name in text for name in shown)
        assert ("A100" in text) == (device is None)


def test_json_is_the_whole_plan(capsys):
    command(BIG, batch=8, context=1024, dtype="bf16", device="h200", as_json=True)
    read = json.loads(capsys.readouterr().out)
    assert read == as_dict(make_plan(BIG, batch=8, context=1024, devices=[DEVICES["h200"]]))
    assert read["parameters"]["feed_forward"]["each"] == 176_160_768
    assert read["placements"][0]["device"]["name"] == "H200"


def test_this_machine_is_measured_within_what_machines_can_do():
    device = find_device(HERE)
    assert device.source == "measured"
    assert 0.5e9 < device.bandwidth < 10e12
    assert 0.5e9 < device.flops == device.flops_at("bf16") == device.flops_at("fp32") < 1e15
    assert device.memory_bytes == devices.memory()[0]


def test_available_memory_is_within_the_total():
    total, available = devices.memory()
    assert 0 < available <= total


@pytest.mark.parametrize(
    ("files", "quota", "limit"),
    [
        ({"cpu.max": "150000 100000", "memory.max": "123456"}, 1.5, 123456),
        ({"cpu.max": "max 100000", "memory.max": "max"}, math.inf, None),
        ({"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, 0.5, None),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, math.inf, None),
        ({"memory/memory.limit_in_bytes": "654321"}, math.inf, 654321),
        ({}, math.inf, None),
    ],
)
def test_limits_of_a_container_are_kept(files, quota, limit, tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "CGROUP", tmp_path / "none")
    unlimited = devices.memory()[0]
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(devices, "CGROUP", tmp_path)
    assert devices.cpu_quota() == quota
    assert devices.memory()[0] == (limit or unlimited)
    assert devices.memory()[1] <= (limit or unlimited)
