"""The config: exact counts, the files it comes from, and every impossible one refused in one sentence."""

import json
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import varied_configs

from tinymoe import InputError, MixtralConfig
from tinymoe.config import HF_KEYS, PRESETS, load_config

INTEGERS = {  # field -> the least it may be
    **dict.fromkeys(("dim", "n_layers", "hidden_dim", "n_heads", "n_kv_heads", "context_len", "vocab_size"), 1),
    "head_dim": 2,
    "num_experts": 0,
    "top_k_experts": 1,
    "sliding_window": 1,
    "moe_every": 1,
}
NUMBERS = ("rope_theta", "norm_eps", "aux_loss_coef", "z_loss_coef", "router_jitter", "bias_update_rate")
FLAGS = ("tie_embeddings", "noisy_top_k", "expert_choice")
JUNK = [
    True,
    False,
    None,
    math.nan,
    math.inf,
    -math.inf,
    10**400,
    -(10**400),
    2**31,
    -1,
    0,
    -0.5,
    1.5,
    "8",
    "",
    [],
    {},
    [8],
]

# What is published with the models' weights.
RELEASED_8X7B = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 32000,
}
PARAMS_8X7B = {
    "dim": 4096,
    "n_layers": 32,
    "head_dim": 128,
    "hidden_dim": 14336,
    "n_heads": 32,
    "n_kv_heads": 8,
    "norm_eps": 1e-05,
    "vocab_size": 32000,
    "moe": {"num_experts_per_tok": 2, "num_experts": 8},
}


def read_or_refuse(function, *arguments, **named):
    """Return what the function reads, or None if it refuses, which takes one line."""
    try:
        return function(*arguments, **named)
    except InputError as error:
        message = str(error)
    assert len(message.splitlines()) == 1
    return None


def refusal(function, *arguments, **named):
    """Return the one line that refuses."""
    with pytest.raises(InputError) as refused:
        function(*arguments, **named)
    message = str(refused.value)
    assert len(message.splitlines()) == 1
    assert len(message) < 300
    return message


# Counts.


@pytest.mark.parametrize(
    ("config", "total", "active"),
    [
        (MixtralConfig(), 46_702_792_704, 12_879_925_248),
        (MixtralConfig.mixtral_8x7b(), 46_702_792_704, 12_879_925_248),
        (MixtralConfig.mixtral_8x22b(), 140_620_634_112, 39_152_031_744),
        (MixtralConfig.mistral_7b(), 7_241_732_096, 7_241_732_096),
    ],
    ids=["paper", "8x7b", "8x22b", "7b"],
)
def test_published_counts(config, total, active):
    assert (config.count_parameters(), config.count_active_parameters()) == (total, active)


@pytest.mark.parametrize(("preset", "millions"), [("tiny", 0.5), ("small", 3.4)])
def test_small_presets_are_as_large_as_they_say(preset, millions):
    config = load_config(preset)
    assert round(config.count_parameters() / 1e6, 1) == millions
    assert f"{millions} M parameters over bytes" in getattr(MixtralConfig, preset).__doc__
    assert config.vocab_size == 256


@given(varied_configs())
def test_counts_are_the_sums_over_the_parameters(config):
    shapes = list(config.parameter_shapes())
    assert len(dict(shapes)) == len(shapes)
    assert config.count_parameters() == sum(math.prod(shape) for _, shape in shapes)
    active = 0
    for name, shape in shapes:
        expert = name.endswith(("moe.w1", "moe.w2", "moe.w3"))
        active += config.top_k_experts * math.prod(shape[1:]) if expert else math.prod(shape)
    assert config.count_active_parameters() == active


def test_every_parameter_of_a_dense_model_is_active():
    config = MixtralConfig.tiny(num_experts=0)
    assert config.count_active_parameters() == config.count_parameters()


def test_defaults_are_the_papers_table_1():
    table = dict(dim=4096, n_layers=32, head_dim=128, hidden_dim=14336, n_heads=32, n_kv_heads=8, context_len=32768)
    table |= dict(vocab_size=32000, num_experts=8, top_k_experts=2)
    assert {name: getattr(MixtralConfig(), name) for name in table} == table


# Files.


@given(varied_configs())
def test_config_json_reads_back_as_written(config):
    values = json.loads(json.dumps(config.to_hf()))
    assert MixtralConfig.from_hf(values) == config
    assert values["model_type"] == ("mixtral" if config.num_experts else "mistral")
    assert values["architectures"] == ["MixtralForCausalLM" if config.num_experts else "MistralForCausalLM"]
    assert ("num_local_experts" in values) == (config.num_experts > 0)


def test_dense_config_reads_back_as_written():
    config = MixtralConfig.tiny(num_experts=0)
    assert MixtralConfig.from_hf(config.to_hf()) == config


def test_released_files_give_the_presets():
    assert MixtralConfig.from_hf(RELEASED_8X7B) == MixtralConfig.mixtral_8x7b()
    assert MixtralConfig.from_mistral(PARAMS_8X7B) == MixtralConfig()
    dense = {key: value for key, value in PARAMS_8X7B.items() if key != "moe"} | {"sliding_window": 4096}
    assert MixtralConfig.from_mistral(dense) == MixtralConfig.mistral_7b()


def test_absent_keys_take_transformers_defaults():
    mixtral = MixtralConfig(context_len=131072, aux_loss_coef=0.001)
    assert MixtralConfig.from_hf({"model_type": "mixtral"}) == mixtral
    mistral = MixtralConfig.mistral_7b(context_len=131072, norm_eps=1e-6)
    assert MixtralConfig.from_hf({"model_type": "mistral"}) == mistral


def test_theta_may_stand_in_rope_parameters_and_head_dim_may_be_null():
    values = RELEASED_8X7B | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "head_dim": None}
    assert MixtralConfig.from_hf(values) == MixtralConfig.mixtral_8x7b(rope_theta=5e5)


@pytest.mark.parametrize("config", [MixtralConfig.tiny(), MixtralConfig.mistral_7b()], ids=["experts", "dense"])
def test_file_and_directory_are_read(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    for name in (tmp_path, str(tmp_path), tmp_path / "config.json"):
        assert load_config(name) == config
    (tmp_path / "config.json").rename(tmp_path / "other.json")
    (tmp_path / "params.json").write_text(json.dumps(PARAMS_8X7B))
    assert load_config(tmp_path) == MixtralConfig()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_names(name):
    assert load_config(name) == getattr(MixtralConfig, name)()
    assert getattr(MixtralConfig, name)(vocab_size=999).vocab_size == 999


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b'{"dim": 3',
        b"\xff\xfe\x00",
        b"\x00\x01",
        b"{'dim': 3}",
        b'{"dim": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
    ],
    ids=["empty", "brace", "cut", "utf16", "binary", "quotes", "digits", "lists", "objects"],
)
def test_file_that_is_no_json_is_refused(content, tmp_path):
    file = tmp_path / "config.json"
    file.write_bytes(content)
    assert refusal(MixtralConfig.from_file, file).startswith(f"{file} is not valid JSON: ")


@pytest.mark.parametrize(
    ("content", "kind"), [("[]", "list"), ("3", "int"), ("null", "NoneType"), ('"x"', "str"), ("NaN", "float")]
)
def test_file_that_holds_no_object_is_refused(content, kind, tmp_path):
    (tmp_path / "config.json").write_text(content)
    assert f"holds a JSON {kind} where an object is expected" in refusal(load_config, tmp_path)


def test_file_that_is_not_there_is_refused(tmp_path):
    assert "No such file" in refusal(MixtralConfig.from_file, tmp_path / "config.json")
    assert "Is a directory" in refusal(MixtralConfig.from_file, tmp_path)
    assert "holds neither config.json nor params.json" in refusal(load_config, tmp_path)
    for name in ("no-such-preset", "", "a\nb", "a\0b", "~"):
        refusal(load_config, name if name else tmp_path / "nothing")


def test_name_that_no_file_can_have_is_refused():
    assert "xxx" in refusal(load_config, "x" * 5000)


def test_a_files_refusal_names_the_file(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(RELEASED_8X7B | {"hidden_size": -1}))
    assert refusal(load_config, file).startswith(f"{file}: dim is -1; ")


# What is impossible.


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(dim=65), "dim 65 is no multiple of n_heads 4"),
        (dict(head_dim=3), "head_dim is 3, but rotary positions turn pairs"),
        (dict(dim=4, n_heads=4), "head_dim is 1; give at least 2"),
        (dict(n_heads=4, n_kv_heads=3), "n_heads 4 is no multiple of n_kv_heads 3"),
        (dict(n_kv_heads=8), "n_heads 4 is no multiple of n_kv_heads 8"),
        (dict(top_k_experts=9), "top_k_experts is 9, but there are only 8 experts"),
        (dict(top_k_experts=0), "top_k_experts is 0; give at least 1"),
        (dict(num_experts=-1), "num_experts is -1; give at least 0"),
        (dict(sliding_window=0), "sliding_window is 0; give at least 1"),
        (dict(rope_theta=0), "rope_theta is 0; give a number above 0"),
        (dict(norm_eps=0.0), "norm_eps is 0.0; give a number above 0"),
        (dict(aux_loss_coef=-0.1), "aux_loss_coef is -0.1; give a number of at least 0"),
        (dict(tie_embeddings="false"), "tie_embeddings is 'false'; give true or false"),
        (dict(tie_embeddings=1), "tie_embeddings is 1; give true or false"),
        (dict(router_jitter=1.0), "router_jitter is 1.0; give less than 1"),
        (dict(capacity_factor=0), "capacity_factor is 0; give a number above 0"),
        (dict(moe_every=3), "moe_every is 3, but there are only 2 layers"),
        (dict(noisy_top_k=1), "noisy_top_k is 1; give true or false"),
        (dict(expert_choice=True, noisy_top_k=True), "expert_choice leaves tokens nothing to choose"),
        (dict(expert_choice=True, bias_update_rate=0.1), "expert_choice leaves tokens nothing to choose"),
        (dict(num_experts=0, capacity_factor=1.0), "moe_every and balancing need experts"),
        (dict(vocab_size=2**31), "vocab_size is 2147483648; give at least 1 and less than 2³¹"),
        (dict(dim="x" * 1000), "dim is 'xxx"),
        (dict(dim=10**5000), "dim is an integer of thousands of digits; give"),
    ],
)
def test_impossible_configs_are_refused_with_what_is_possible(changes, says):
    assert refusal(MixtralConfig.tiny, **changes).startswith(says)


@given(st.sampled_from([*INTEGERS, *NUMBERS, *FLAGS]), st.sampled_from(JUNK) | st.floats() | st.integers())
@pytest.mark.parametrize("read", ["fields", "config.json"])
def test_every_value_is_kept_or_refused(read, field, value):
    if read == "fields":
        config = read_or_refuse(MixtralConfig.tiny, **{field: value})
    else:
        values = MixtralConfig.tiny().to_hf() | {HF_KEYS[field]: value}
        config = read_or_refuse(MixtralConfig.from_hf, json.loads(json.dumps(values)))
    if config is None:
        return
    if value is None:
        assert field in ("head_dim", "sliding_window")
        return
    assert getattr(config, field) == value
    if field in INTEGERS:
        assert type(value) is int
        assert INTEGERS[field] <= value < 2**31
    elif field in NUMBERS:
        assert type(value) in (int, float)
        assert math.isfinite(value)
        assert value > 0 or (value == 0 and field not in ("rope_theta", "norm_eps"))
        assert value < 1 or field != "router_jitter"
    else:
        assert type(value) is bool


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@given(
    st.sampled_from(["model_type", "hidden_act", "rope_parameters", "rope_scaling", "num_local_experts"]), json_values
)
@example("rope_parameters", {"rope_type": "yarn", "factor": 4})
@example("rope_scaling", {"type": "linear"})
@example("hidden_act", "gelu")
@example("model_type", ["mixtral"])
def test_config_json_with_anything_in_it_is_read_or_refused(key, value):
    config = read_or_refuse(MixtralConfig.from_hf, RELEASED_8X7B | {key: value})
    if config:
        assert config == MixtralConfig.mixtral_8x7b(num_experts=config.num_experts, rope_theta=config.rope_theta)


@given(st.sampled_from([*PARAMS_8X7B, "rope_theta", "sliding_window", "max_seq_len", "tied_embeddings"]), json_values)
@example("moe", {"num_experts": 8})
@example("moe", [8, 2])
def test_params_json_with_anything_in_it_is_read_or_refused(key, value):
    config = read_or_refuse(MixtralConfig.from_mistral, PARAMS_8X7B | {key: value})
    if config and key in HF_KEYS:
        assert getattr(config, key) == value or not value


@pytest.mark.parametrize("value", [10**5000, "x" * 1000, ["x"] * 1000], ids=["digits", "text", "list"])
@pytest.mark.parametrize("key", ["model_type", "hidden_act", "rope_parameters"])
def test_what_is_refused_is_not_repeated_at_length(key, value):
    assert refusal(MixtralConfig.from_hf, RELEASED_8X7B | {key: value}).count("x") < 200  # and one short line


@pytest.mark.parametrize("key", [key for key in PARAMS_8X7B if key != "moe"])
def test_params_json_without_a_key_is_refused(key):
    values = {other: value for other, value in PARAMS_8X7B.items() if other != key}
    assert refusal(MixtralConfig.from_mistral, values) == f"params.json lacks {key}"


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({}, "model_type is None; tinymoe reads 'mixtral' and 'mistral'"),
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"model_type": "mixtral", "hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"model_type": "mixtral", "rope_scaling": {"type": "linear", "factor": 2}}, "rope_type is 'linear'"),
        ({"model_type": "mixtral", "rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn'"),
    ],
)
def test_other_architectures_are_refused(values, says):
    assert refusal(MixtralConfig.from_hf, values).startswith(says)
