"""A memory-mapped model reads what it needs and nothing else, at the size of Mixtral 8x7B, too."""

import json
import math
import os
import time

import numpy as np
import pytest
from checkpoints import GOLDEN, write_parts

from tinymoe import InputError, Mixtral
from tinymoe.cache import KVCache
from tinymoe.checkpoint.mapped import Part


@pytest.fixture
def reads(monkeypatch):
    """Record what is read from disk: (tensor, piece, row)."""
    calls = []
    read = Part.read

    def recorded(part, dtype, row=None):
        calls.append((part.name, part.index, row))
        return read(part, dtype, row)

    monkeypatch.setattr(Part, "read", recorded)
    return calls


def test_opening_a_mapped_model_reads_no_weight(reads):
    Mixtral.from_pretrained(GOLDEN / "plain", mmap=True)
    assert {name for name, *_ in reads} <= {"model.norm.weight"}  # it tells the dtype


def experts_of(reads):
    """Return layer → the set of experts that were read, and check that each of their matrices was read once."""
    experts, matrices = {}, []
    for name, piece, _ in reads:
        if ".experts." not in name:
            continue
        words = name.split(".")
        fused = words[-1] in ("gate_up_proj", "down_proj")
        e = piece[0] if fused else int(words[words.index("experts") + 1])
        experts.setdefault(int(words[words.index("layers") + 1]), set()).add(e)
        matrices.append((name, str(piece)))
        assert isinstance(e, int)  # one expert, not a slice of the stack
    assert len(matrices) == len(set(matrices)) == 3 * sum(map(len, experts.values()))
    return experts


@pytest.mark.parametrize("case", ["plain", "fused_v5", "mistral_layout", "top_1", "sharded", "bfloat16"])
@pytest.mark.parametrize("length", [1, 3])
def test_only_the_experts_that_tokens_choose_are_read(reads, case, length):
    model, mapped = Mixtral.from_pretrained(GOLDEN / case), Mixtral.from_pretrained(GOLDEN / case, mmap=True)
    config, tokens = model.config, np.arange(5, 5 + length)
    _, chosen = model.extend([tokens], [KVCache(config, length)])
    expected = {layer: set(experts.ravel().tolist()) for layer, experts in enumerate(chosen)}
    assert any(len(experts) < config.num_experts for experts in expected.values())
    for run in (lambda: mapped.extend([tokens], [KVCache(config, length)]), lambda: mapped(tokens[None])):
        reads.clear()
        run()
        assert experts_of(reads) == expected


def test_only_the_rows_of_the_embedding_that_occur_are_read(reads):
    mapped = Mixtral.from_pretrained(GOLDEN / "plain", mmap=True)
    reads.clear()
    mapped(np.array([[7, 3, 7, 46]]))
    assert [row for name, _, row in reads if name == "model.embed_tokens.weight"] == [3, 7, 46]


def test_mapped_model_refuses_to_be_trained():
    mapped = Mixtral.from_pretrained(GOLDEN / "plain", mmap=True)
    tokens = np.arange(9)[None]
    with pytest.raises(InputError, match="without mmap"):
        mapped.loss_and_grads(tokens, tokens)


# Mixtral 8x7B, as holes.


@pytest.fixture
def mixtral_8x7b(tmp_path):
    """Return a model directory with the config and all tensors of Mixtral 8x7B, their 93 GB a hole in the file."""
    D, F, V, E, kv = 4096, 14336, 32000, 8, 1024
    layer = {"input_layernorm": (D,), "post_attention_layernorm": (D,), "block_sparse_moe.gate": (E, D)}
    layer |= {f"self_attn.{x}_proj": (kv if x in "kv" else D, D) for x in "qkvo"}
    for e in range(E):
        layer |= {f"block_sparse_moe.experts.{e}.{w}": (D, F) if w == "w2" else (F, D) for w in ("w1", "w2", "w3")}
    shapes = {"model.embed_tokens": (V, D), "model.norm": (D,), "lm_head": (V, D)}
    shapes |= {f"model.layers.{n}.{name}": shape for n in range(32) for name, shape in layer.items()}
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[f"{name}.weight"] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    path = tmp_path / "model.safetensors"
    try:
        write_parts(path, header, b"")
        os.truncate(path, path.stat().st_size + end)
    except OSError as error:
        pytest.skip(f"no file of 93 GB can be made here: {error}")
    if path.stat().st_blocks * 512 > 2**24:
        path.unlink()
        pytest.skip("this file system has no sparse files")
    config = dict(model_type="mixtral", hidden_size=D, intermediate_size=F, num_hidden_layers=32)
    config |= dict(num_attention_heads=32, num_key_value_heads=8, num_local_experts=E, num_experts_per_tok=2)
    config |= dict(vocab_size=V, max_position_embeddings=32768, rms_norm_eps=1e-5, rope_theta=1e6, sliding_window=None)
    (tmp_path / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
    yield tmp_path
    path.unlink()


def test_mixtral_8x7b_opens_in_three_seconds_with_every_parameter(mixtral_8x7b, reads):
    start = time.perf_counter()
    model = Mixtral.from_pretrained(mixtral_8x7b, mmap=True)
    assert time.perf_counter() - start < 3
    assert {name for name, *_ in reads} <= {"model.norm.weight"}
    assert sum(map(math.prod, model.params.shapes.values())) == 46_702_792_704
    assert model.config.count_parameters() == 46_702_792_704
