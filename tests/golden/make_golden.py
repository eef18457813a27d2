"""Write the golden checkpoints: small models as others write them, and the numbers transformers computes with them.

Run ``python tests/golden/make_golden.py`` where torch and transformers are installed (the extra ``parity``). It writes
one folder per case beside this file, with a checkpoint and ``expected.safetensors``, and versions.json. The tests that
read them need neither. A second run on the same machine writes the same bytes, but for the date.
"""

import datetime
import json
import platform
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save, save_file
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

HERE = Path(__file__).parent
MARGIN = 1e-3  # between the last expert chosen and the first not chosen, and between the two best next tokens
PROMPT, NEW = 8, 18
BASE = dict(
    vocab_size=47,
    hidden_size=16,
    intermediate_size=14,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=None,
    eos_token_id=None,
)
SPARSE = dict(num_local_experts=4, num_experts_per_tok=2)
ODD = dict(
    vocab_size=43,
    hidden_size=15,
    intermediate_size=13,
    num_hidden_layers=3,
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=6,
    num_local_experts=3,
)

# Case: what differs from the plain model, then how it is written and how its batch looks.
CASES = {
    "plain": dict(),
    "odd_sizes": dict(config=ODD, batch=(3, 13)),
    "head_dim": dict(config=dict(head_dim=10)),
    "sliding_window": dict(config=dict(sliding_window=6)),
    "tied": dict(config=dict(tie_word_embeddings=True)),
    "top_1": dict(config=dict(num_local_experts=7, num_experts_per_tok=1), batch=(1, 5)),  # some experts idle
    "all_experts": dict(config=dict(num_local_experts=3, num_experts_per_tok=3)),
    "rope_and_eps": dict(config=dict(rope_theta=123.0, rms_norm_eps=0.05)),
    "sharded": dict(write="sharded"),
    "bfloat16": dict(dtype=torch.bfloat16),
    "float16": dict(dtype=torch.float16),
    "dense": dict(dense=True, config=dict(sliding_window=7)),
    "transformers_v4": dict(write="v4", config=dict(rope_theta=5e5)),
    "fused_v5": dict(write="fused"),
    "mistral_layout": dict(write="mistral", config=dict(rope_theta=1e4)),
    "mistral_layout_dense": dict(write="mistral", dense=True, config=dict(sliding_window=7, head_dim=6)),
}


def main():
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # the order of sums, hence the bits
    for number, (name, case) in enumerate(CASES.items()):
        shutil.rmtree(HERE / name, ignore_errors=True)
        seed = write_case(HERE / name, number, **case)
        print(f"{name}: seed {seed}, {sum(file.stat().st_size for file in (HERE / name).iterdir()):,} bytes")
    versions = {module.__name__: module.__version__ for module in (torch, transformers, np)}
    command = "python tests/golden/make_golden.py"
    when = {"date": datetime.date.today().isoformat(), "command": command}
    write_json(HERE / "versions.json", {"python": platform.python_version(), **versions, **when})


def write_case(folder, number, config=None, dense=False, dtype=torch.float32, write="plain", batch=(2, 21)):
    """Write one folder, with the first seed whose choices are all clear."""
    for seed in range(1000):
        rng = np.random.default_rng([number, seed])
        source = random_model(rng, config or {}, dense)
        with tempfile.TemporaryDirectory() as plain:
            source.to(dtype).save_pretrained(plain, max_shard_size="12KB" if write == "sharded" else "1GB")
            Path(plain, "generation_config.json").unlink()
            layout = Path(tempfile.mkdtemp(dir=plain))
            LAYOUTS[write](Path(plain), layout, source.config)
            readable = plain if write == "mistral" else layout  # transformers does not read Mistral's layout
            expected = compute(open_model(readable), rng, batch)
            if expected is not None:
                folder.mkdir()
                for file in layout.iterdir():
                    shutil.copyfile(file, folder / file.name)
                (folder / "expected.safetensors").write_bytes(save(expected))
                return seed
    raise SystemExit(f"{folder.name}: no seed keeps its choices apart")


def random_model(rng, changes, dense):
    kind = transformers.MistralForCausalLM if dense else transformers.MixtralForCausalLM
    model = kind(kind.config_class(**(BASE | ({} if dense else SPARSE) | changes)))
    for name, weight in model.named_parameters():
        normal = torch.from_numpy(rng.standard_normal(weight.shape, np.float32))
        weight.data = 1 + 0.2 * normal if "norm" in name else (0.6 if "gate.weight" in name else 0.3) * normal
    return model


def open_model(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    return model.eval()


# The numbers.


def compute(model, rng, batch):
    """Return what transformers computes, or None where a choice is so close that rounding could turn it."""
    config = model.config
    tokens = torch.from_numpy(rng.integers(0, config.vocab_size, batch))
    targets = torch.from_numpy(np.where(rng.random(batch) < 0.2, -100, rng.integers(0, config.vocab_size, batch)))
    sparse = config.model_type == "mixtral"
    out = model(tokens, **({"output_router_logits": True} if sparse else {}))
    loss = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), targets.flatten())
    loss.backward()
    expected = {"tokens": tokens, "targets": targets, "logits": out.logits.detach(), "loss": loss.detach()}
    if sparse:
        experts, top_k = config.num_local_experts, config.num_experts_per_tok
        if routing_margin(out.router_logits, top_k) < MARGIN:
            return None
        expected["hf_aux_loss"] = load_balancing_loss_func(out.router_logits, experts, top_k).detach()
    for name, parameter in model.named_parameters():
        expected |= {f"grad.{part}": grad for part, grad in on_disk(name, parameter.grad).items()}

    text = torch.from_numpy(rng.integers(0, config.vocab_size, (1, PROMPT)))
    for _ in range(NEW):  # the whole text anew for each token: nothing is cached
        with torch.no_grad():
            out = model(text, use_cache=False, **({"output_router_logits": True} if sparse else {}))
        best = out.logits[0, -1].topk(2).values
        if best[0] - best[1] < MARGIN or (sparse and routing_margin(out.router_logits, top_k) < MARGIN):
            return None
        text = torch.cat([text, out.logits[:, -1:].argmax(-1)], dim=1)
    return expected | {"prompt": text[0, :PROMPT].clone(), "text": text[0].clone()}


def routing_margin(router_logits, top_k):
    """Return the least distance between a chosen expert's logit and that of one left out."""
    if top_k == router_logits[0].shape[-1]:
        return torch.inf
    best = torch.cat(list(router_logits)).topk(top_k + 1).values
    return (best[:, top_k - 1] - best[:, top_k]).min()


def on_disk(name, tensor):
    """Split a tensor with all experts, as version 5 has them in memory, into one each, as version 4 named them."""
    layer = name.partition(".mlp.")[0] + ".block_sparse_moe."
    if name.endswith("experts.gate_up_proj"):
        halves = {"w1": tensor.chunk(2, dim=1)[0], "w3": tensor.chunk(2, dim=1)[1]}
        return {f"{layer}experts.{e}.{w}.weight": x[e].contiguous() for w, x in halves.items() for e in range(len(x))}
    if name.endswith("experts.down_proj"):
        return {f"{layer}experts.{e}.w2.weight": x.contiguous() for e, x in enumerate(tensor)}
    return {name.replace(".mlp.gate.", ".block_sparse_moe.gate."): tensor}


# The files: from what transformers writes to what is tested.


def copy(plain, layout, config):
    for file in plain.iterdir():
        if file.is_file():
            shutil.copy(file, layout)


def as_version_4(plain, layout, config):
    """Write the config with the keys that version 4 had, and the rotary frequencies that it saved at first."""
    keys = (
        "architectures attention_dropout bos_token_id eos_token_id head_dim hidden_act hidden_size initializer_range "
        "intermediate_size max_position_embeddings model_type num_attention_heads num_experts_per_tok "
        "num_hidden_layers num_key_value_heads num_local_experts output_router_logits rms_norm_eps "
        "router_aux_loss_coef router_jitter_noise sliding_window tie_word_embeddings use_cache vocab_size"
    )
    new = json.loads((plain / "config.json").read_text())
    old = {key: new[key] for key in keys.split()} | {"head_dim": None}
    old |= {"rope_theta": config.rope_parameters["rope_theta"], "torch_dtype": "float32"}
    write_json(layout / "config.json", dict(sorted((old | {"transformers_version": "4.36.0.dev0"}).items())))
    tensors = load_file(plain / "model.safetensors")
    K = config.hidden_size // config.num_attention_heads
    for layer in range(config.num_hidden_layers):
        frequencies = config.rope_parameters["rope_theta"] ** -(torch.arange(0, K, 2) / K)
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = frequencies
    save_file(tensors, layout / "model.safetensors", {"format": "pt"})


def fused(plain, layout, config):
    """Write the names that version 5 has in memory: all experts of a layer in two tensors."""
    shutil.copy(plain / "config.json", layout)
    tensors = load_file(plain / "model.safetensors")
    for layer in range(config.num_hidden_layers):
        old, new = f"model.layers.{layer}.block_sparse_moe.", f"model.layers.{layer}.mlp."
        experts = [
            [tensors.pop(f"{old}experts.{e}.{w}.weight") for w in ("w1", "w3", "w2")]
            for e in range(config.num_local_experts)
        ]
        tensors[f"{new}experts.gate_up_proj"] = torch.stack([torch.cat([w1, w3]) for w1, w3, _ in experts])
        tensors[f"{new}experts.down_proj"] = torch.stack([w2 for *_, w2 in experts])
        tensors[f"{new}gate.weight"] = tensors.pop(f"{old}gate.weight")
    save_file(tensors, layout / "model.safetensors", {"format": "pt"})


def as_mistral(plain, layout, config):
    """Write Mistral's own files; row 2i of a head is transformers' row i, and 2i + 1 its i + K/2."""
    sparse, H, G = config.model_type == "mixtral", config.num_attention_heads, config.num_key_value_heads
    K = config.head_dim or config.hidden_size // H
    check_interleaving(K, config.rope_parameters["rope_theta"])
    params = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "head_dim": K,
        "hidden_dim": config.intermediate_size,
        "n_heads": H,
        "n_kv_heads": G,
        "norm_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "rope_theta": config.rope_parameters["rope_theta"],
    }
    if config.sliding_window:
        params["sliding_window"] = config.sliding_window
    if sparse:
        moe = {"num_experts_per_tok": config.num_experts_per_tok, "num_experts": config.num_local_experts}
        params["moe"] = moe
    write_json(layout / "params.json", params)
    names = {
        "model.embed_tokens": "tok_embeddings",
        "model.norm": "norm",
        "lm_head": "output",
        "model.layers": "layers",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "block_sparse_moe": "feed_forward",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
        **{f"self_attn.{x}_proj": f"attention.w{x}" for x in "qkvo"},
    }
    tensors = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        heads = H if ".q_proj." in name else G if ".k_proj." in name else 0
        for old, new in names.items():
            name = name.replace(old, new)
        tensors[name] = tensor[neighbours(heads, K)] if heads else tensor
    save_file(tensors, layout / "consolidated.safetensors")


def neighbours(heads, K):
    return [head * K + i + half for head in range(heads) for i in range(K // 2) for half in (0, K // 2)]


def check_interleaving(K, theta):
    """Check `neighbours` against Mistral's rotation, a product of complex numbers, and transformers' rotate-half."""
    q, k = torch.randn(2, 5, K, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    angles = torch.outer(torch.arange(5.0).double(), theta ** -(torch.arange(0, K, 2).double() / K))
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    halves = transformers.models.mixtral.modeling_mixtral.apply_rotary_pos_emb(q[None], k[None], cos, sin, 0)

    def rotate(x):
        pairs = torch.view_as_complex(x[:, neighbours(1, K)].unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(1)

    torch.testing.assert_close(rotate(q) @ rotate(k).T, halves[0][0] @ halves[1][0].T)


LAYOUTS = {"plain": copy, "sharded": copy, "v4": as_version_4, "fused": fused, "mistral": as_mistral}


def write_json(path, values):
    path.write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    main()
