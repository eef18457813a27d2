"""The same models live in transformers and here: drawn configurations, both directions on disk."""

import functools

import numpy as np
import pytest

from tinymoe import Mixtral, MixtralConfig, checkpoint, generate, hf_load_balancing_loss

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity
SEEDS = (9, 15, 16, 18, 25, 27, 31, 33, 51, 55)


def drawn_config(rng):
    """Return a small config, its sizes no multiples of anything; one in five is dense."""
    kv_heads, experts = int(rng.integers(1, 4)), int(rng.integers(2, 7))
    dense = rng.random() < 0.2
    return MixtralConfig(
        dim=int(rng.integers(9, 40)),
        n_layers=int(rng.integers(1, 4)),
        head_dim=2 * int(rng.integers(1, 9)),
        hidden_dim=int(rng.integers(5, 50)),
        n_heads=kv_heads * int(rng.integers(1, 4)),
        n_kv_heads=kv_heads,
        context_len=int(rng.integers(40, 90)),
        vocab_size=int(rng.integers(20, 80)),
        num_experts=0 if dense else experts,
        top_k_experts=0 if dense else int(rng.integers(1, experts + 1)),
        rope_theta=float(10 ** rng.uniform(1, 6)),
        norm_eps=float(10 ** rng.uniform(-6, -2)),
        sliding_window=int(rng.integers(1, 20)) if rng.random() < 0.5 else None,
        tie_embeddings=bool(rng.random() < 0.3),
        aux_loss_coef=MixtralConfig.aux_loss_coef if dense else float(rng.uniform(0, 0.1)),
    )


@functools.cache
def model_of(seed):
    """Return a model with weights large enough that nothing in it is nearly linear."""
    rng = np.random.default_rng(seed)
    config = drawn_config(rng)
    params = {
        name: (rng.normal(1, 0.2, shape) if name.endswith("norm") else rng.normal(0, 0.3, shape)).astype(np.float32)
        for name, shape in config.parameter_shapes()
    }
    return Mixtral(config, params, num_workers=1)


def opened_by_transformers(folder, dtype="float32"):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    ).eval()


@pytest.fixture(scope="module", params=SEEDS)
def pair(request, tmp_path_factory):
    """Return a model, and the same as transformers reads it from what tinymoe saved."""
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # more only wait for each other at this size
    folder = tmp_path_factory.mktemp("saved")
    model = model_of(request.param)
    model.save_pretrained(folder)
    return model, opened_by_transformers(folder)


def batch_of(model, shape=(2, 33)):
    rng = np.random.default_rng(model.config.dim)
    tokens = rng.integers(0, model.config.vocab_size, shape)
    return tokens, np.where(rng.random(shape) < 0.2, -100, rng.integers(0, model.config.vocab_size, shape))


def named_on_disk(named, config):
    """Return tensors that transformers has in memory under their names on disk, the experts apart."""
    tensors = {}
    for name, tensor in named:
        layer, _, rest = name.partition(".mlp.")
        experts = f"{layer}.block_sparse_moe.experts"
        if rest == "experts.gate_up_proj":
            for e in range(config.num_experts):
                tensors[f"{experts}.{e}.w1.weight"] = tensor[e, : config.hidden_dim].numpy()
                tensors[f"{experts}.{e}.w3.weight"] = tensor[e, config.hidden_dim :].numpy()
        elif rest == "experts.down_proj":
            tensors |= {f"{experts}.{e}.w2.weight": tensor[e].numpy() for e in range(config.num_experts)}
        else:
            tensors[name.replace(".mlp.gate.", ".block_sparse_moe.gate.")] = tensor.numpy()
    return tensors


def assert_close(actual, expected, tol, floor=0.0):
    difference = np.linalg.norm(actual.astype(np.float64) - expected)
    assert difference <= tol * max(np.linalg.norm(expected), floor)  # false for NaN


def assert_same_tensors(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(actual[name], tensor, strict=True)


def test_the_drawn_models_cover_what_differs():
    configs = [model_of(seed).config for seed in SEEDS]
    assert {config.num_experts == 0 for config in configs} == {True, False}
    assert {config.tie_embeddings for config in configs} == {True, False}
    assert {config.sliding_window is None for config in configs} == {True, False}
    assert {config.top_k_experts for config in configs} >= {1, 2}
    assert any(config.num_experts == config.top_k_experts > 0 for config in configs)
    assert any(config.head_dim * config.n_heads != config.dim for config in configs)


@pytest.mark.parametrize("seed", SEEDS)
def test_no_choice_of_the_drawn_models_is_close_enough_for_rounding_to_turn_it(seed):
    model, k = model_of(seed), model_of(seed).config.top_k_experts
    if not 0 < k < model.config.num_experts:
        return
    best = -np.sort(-np.concatenate(model.router_logits(batch_of(model)[0])), axis=1)
    assert (best[:, k - 1] - best[:, k]).min() > 1e-3


# From here to transformers.


def test_transformers_reads_the_tensors_that_were_saved(pair):
    model, peer = pair
    tied = {"lm_head.weight"} if model.config.tie_embeddings else set()
    theirs = [(name, tensor) for name, tensor in peer.state_dict().items() if name not in tied]
    assert_same_tensors(named_on_disk(theirs, model.config), checkpoint.to_hf(model.params, model.config))


def test_transformers_reads_the_config_that_was_saved(pair):
    model, peer = pair
    ours, theirs = model.config, peer.config
    assert theirs.model_type == ("mixtral" if ours.num_experts else "mistral")
    assert theirs.hidden_size == ours.dim
    assert theirs.num_hidden_layers == ours.n_layers
    assert theirs.head_dim == ours.head_dim
    assert theirs.intermediate_size == ours.hidden_dim
    assert theirs.num_attention_heads == ours.n_heads
    assert theirs.num_key_value_heads == ours.n_kv_heads
    assert theirs.max_position_embeddings == ours.context_len
    assert theirs.vocab_size == ours.vocab_size
    assert theirs.rope_parameters == {"rope_type": "default", "rope_theta": ours.rope_theta}
    assert theirs.rms_norm_eps == ours.norm_eps
    assert theirs.sliding_window == ours.sliding_window
    assert theirs.tie_word_embeddings == ours.tie_embeddings
    assert theirs.dtype == torch.float32
    if ours.num_experts:
        assert theirs.num_local_experts == ours.num_experts
        assert theirs.num_experts_per_tok == ours.top_k_experts
        assert theirs.router_aux_loss_coef == ours.aux_loss_coef


def test_logits_loss_and_gradients_are_those_of_transformers(pair):
    model, peer = pair
    tokens, targets = batch_of(model)
    peer.zero_grad()
    their_logits = peer(torch.from_numpy(tokens)).logits
    their_loss = torch.nn.functional.cross_entropy(their_logits.flatten(0, 1), torch.from_numpy(targets).flatten())
    their_loss.backward()
    theirs = named_on_disk([(name, p.grad) for name, p in peer.named_parameters()], model.config)
    loss, grads = model.loss_and_grads(tokens, targets, aux_loss_coef=0, z_loss_coef=0)
    ours = checkpoint.to_hf(grads, model.config)

    assert_close(model(tokens), their_logits.detach().numpy(), tol=2e-5)
    assert abs(loss - their_loss.item()) <= 1e-5
    assert ours.keys() == theirs.keys()
    for name in theirs:
        # where the exact gradient is zero, that of a top-1 router, transformers has rounding errors
        floor = 1e-3 if "gate.weight" in name and model.config.top_k_experts == 1 else 0.0
        assert_close(ours[name], theirs[name], tol=2e-4, floor=floor)


@pytest.mark.parametrize("pair", [seed for seed in SEEDS if model_of(seed).config.num_experts], indirect=True)
def test_auxiliary_loss_is_that_of_transformers(pair):
    model, peer = pair
    tokens, _ = batch_of(model)
    theirs = peer(torch.from_numpy(tokens), output_router_logits=True)
    ours = hf_load_balancing_loss(model.router_logits(tokens), model.config.top_k_experts)
    assert abs(ours - theirs.aux_loss.item()) <= 1e-5


def test_greedy_text_is_that_of_transformers_and_its_cache(pair):
    model, peer = pair
    prompt = batch_of(model, (9,))[0]
    theirs = peer.generate(
        torch.from_numpy(prompt)[None],
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        generation_config=transformers.GenerationConfig(do_sample=False, max_new_tokens=30),
    )
    assert generate(model, prompt, max_new_tokens=30).tolist() == theirs[0].tolist()


# From transformers to here.


def test_what_transformers_saves_is_read_back_whole(pair, tmp_path):
    model, peer = pair
    peer.save_pretrained(tmp_path / "one")
    peer.save_pretrained(tmp_path / "shards", max_shard_size="5KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for folder in ("one", "shards"):
        again = Mixtral.from_pretrained(tmp_path / folder)
        assert again.config == model.config
        assert_same_tensors(again.params, model.params)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_goes_both_ways(tmp_path, dtype):
    model = model_of(SEEDS[0])
    checkpoint.save(tmp_path / "ours", model.params, model.config, dtype=dtype)
    peer = opened_by_transformers(tmp_path / "ours", dtype="auto")
    assert peer.dtype == getattr(torch, dtype)  # from our config.json
    peer.save_pretrained(tmp_path / "theirs")
    ours, theirs = (Mixtral.from_pretrained(tmp_path / name) for name in ("ours", "theirs"))
    assert_same_tensors(theirs.params, ours.params)
    rounded = {name: w.astype(checkpoint.SAVED[dtype]).astype(np.float32) for name, w in model.params.items()}
    assert_same_tensors(ours.params, rounded)
