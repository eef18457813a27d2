r"""
Lesson 17 · Checkpoints: numbers, names, and an order of rows
=============================================================

**The question.** Somebody else trained a model, with another program. What exactly is in the file, what has to be done
to it until this program computes the same numbers, and which mistakes does nobody report?

A checkpoint is less than it seems: names, shapes, and bytes. We write one by hand, then open one that transformers
wrote, with ``struct``, ``json`` and one shift of bits, and run it. The logits and gradients that transformers computed
lie beside it, so that we will know. At the end stands the other kind of file, which is a program.

**You need** rotary positions from :doc:`lesson 3 </lessons/lesson_03_rotary>` and the model from
:doc:`lesson 8 </lessons/lesson_08_model>`. The checkpoints are those of ``tests/golden``: random weights, some 9,000
each, written by ``python tests/golden/make_golden.py`` where torch and transformers are installed. Here
neither is needed.
"""

# %%
# A file by hand
# --------------
# A **safetensors** file is three things in a row: eight bytes that say how long the header is (little-endian,
# unsigned), the header in JSON, and the data. The header gives each tensor a dtype, a shape, and where its bytes begin
# and end, counted from the end of the header; elements are little-endian and in C order, and tensors leave no gaps. We
# store our line, padding the header with spaces so that the data
# starts at a multiple of eight.
import json
import pickle
import pickletools
import struct
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import ml_dtypes
import numpy as np
import safetensors.numpy

import tinymoe

LINE = "def add(a, b): return a + b"
data = LINE.encode()
header = json.dumps({"line": {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}}).encode()
header += b" " * (-len(header) % 8)
folder = tempfile.TemporaryDirectory()
by_hand = Path(folder.name) / "line.safetensors"
by_hand.write_bytes(struct.pack("<Q", len(header)) + header + data)

print(by_hand.read_bytes())
opened = safetensors.numpy.load_file(by_hand)
print({name: (array.dtype, array.shape) for name, array in opened.items()})
assert opened["line"].tobytes().decode() == LINE

# %%
# There is nothing else in the format but an optional ``__metadata__`` of strings: no code, no compression, no checksum,
# no order of tensors that means anything.
#
# A file that transformers wrote
# ------------------------------
repository = Path(tinymoe.__file__).parents[1]
golden = repository / "tests/golden"
versions = json.loads((golden / "versions.json").read_text())
print(f"written with transformers {versions['transformers']}, torch {versions['torch']}")


def read_header(path):
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)  # free text, here the word that it is from torch
    return header, 8 + length  # and where the data starts


path = golden / "bfloat16" / "model.safetensors"
header, start = read_header(path)
print(f"{path.stat().st_size:,} bytes, data from byte {start}, {len(header)} tensors")
for name in list(header)[2:6]:
    print(name, header[name])
assert start + max(entry["data_offsets"][1] for entry in header.values()) == path.stat().st_size

# %%
# Half of a float32
# -----------------
# The weights are BF16, which NumPy does not know. A float32 has a sign, 8 bits of exponent and 23 of fraction. **A
# bfloat16 is its upper half**: sign, the same 8 bits of exponent, and 7 of fraction. So the range is the same, the
# precision about two and a half decimal digits, and to widen one is to put 16 zero bits below it.
#
# The other way has to round. Take the lower half x of the bits: below one half of the last place that is kept, cut it
# off; above, carry one; exactly one half, go to the even neighbour. Adding 0x7FFF, and one more if the last bit that
# stays is 1, carries in just these cases.


def widen(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values):
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


one = np.array([1.0, 1 + 2**-7, 1 + 2**-8, 1 + 3 * 2**-8, -2.5], np.float32)
for value, bits in zip(one, narrow(one)):
    print(f"{value:10.6f} {value.view(np.uint32):032b} -> {bits:016b} = {widen(bits[None])[0]:.6f}")

rng = np.random.default_rng(0)
many = np.concatenate([rng.standard_normal(100_000), np.ldexp(1 + np.arange(512) / 256, 5)]).astype(np.float32)
assert (narrow(many) == many.astype(ml_dtypes.bfloat16).view(np.uint16)).all()  # ties included
assert (widen(narrow(many)) == many.astype(ml_dtypes.bfloat16).astype(np.float32)).all()

# %%
# With that the whole file becomes arrays.
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I64": np.int64, "U8": np.uint8}


def read(path):
    header, start = read_header(path)
    content = path.read_bytes()[start:]
    arrays = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        array = np.frombuffer(content[begin:end], DTYPES[entry["dtype"]]).reshape(entry["shape"])
        arrays[name] = widen(array) if entry["dtype"] == "BF16" else array
    return arrays


on_disk = read(path)
assert all((array == safetensors.numpy.load_file(path)[name].astype("f4")).all() for name, array in on_disk.items())
print("a weight:", on_disk["lm_head.weight"][0, :4])

# %%
# Names
# -----
# The second part of a checkpoint is what the arrays are called. There are as many conventions as programs. Ours are the
# paper's letters; here they stand beside those of transformers, version 4, which are also what version 5 writes.
config = tinymoe.MixtralConfig.from_file(golden / "bfloat16" / "config.json")
TOP = {"tok_embeddings": "model.embed_tokens.weight", "norm": "model.norm.weight", "output": "lm_head.weight"}
LAYER = {
    "attention_norm": "input_layernorm.weight",
    "ffn_norm": "post_attention_layernorm.weight",  # the norm in front of the experts, whatever the name says
    "attention.wq": "self_attn.q_proj.weight",
    "attention.wk": "self_attn.k_proj.weight",
    "attention.wv": "self_attn.v_proj.weight",
    "attention.wo": "self_attn.o_proj.weight",
    "moe.gate": "block_sparse_moe.gate.weight",
    "moe.w1": "block_sparse_moe.experts.{e}.w1.weight",  # (F, D) silu's input
    "moe.w2": "block_sparse_moe.experts.{e}.w2.weight",  # (D, F) back down
    "moe.w3": "block_sparse_moe.experts.{e}.w3.weight",  # (F, D) multiplied
}


def neighbours_from_halves(w, heads):
    """Per head, rows (Re₀, Re₁, …, Im₀, Im₁, …) become (Re₀, Im₀, Re₁, Im₁, …): lesson 3."""
    return w.reshape(heads, 2, -1, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


def translated(on_disk, reorder=True):
    params = {name: on_disk[there] for name, there in TOP.items()}
    for layer in range(config.n_layers):
        for name, there in LAYER.items():
            there = f"model.layers.{layer}.{there}"
            if "{e}" in there:  # experts are separate there and stacked here
                array = np.stack([on_disk[there.format(e=e)] for e in range(config.num_experts)])
            else:
                array = on_disk[there]
            if reorder and name in ("attention.wq", "attention.wk"):
                array = neighbours_from_halves(array, config.n_heads if name.endswith("wq") else config.n_kv_heads)
            params[f"layers.{layer}.{name}"] = np.ascontiguousarray(array)
    return params


params = translated(on_disk)
for name in ("tok_embeddings", "layers.0.attention.wq", "layers.0.moe.gate", "layers.0.moe.w1"):
    print(name, params[name].shape)
assert {name: array.shape for name, array in params.items()} == dict(config.parameter_shapes())

# %%
# The third part is ``config.json``: what shapes do not tell. Two heads of 8 and four of 4 have the same :math:`W_q`;
# θ, ε, k and the window are in no shape at all. A wrong one of these is never noticed by a loader.
theirs = json.loads((golden / "bfloat16" / "config.json").read_text())
for key, field in (("num_attention_heads", "n_heads"), ("num_experts_per_tok", "top_k_experts")):
    print(f"{key} = {theirs[key]} is {field} = {getattr(config, field)}")
print("rope_parameters =", theirs["rope_parameters"], "gives rope_theta =", config.rope_theta)

# %%
# The same numbers
# ----------------
# Now the model runs on weights that we read. Beside it lies what transformers computed from the same file: tokens,
# logits, loss, and the gradient of every parameter.
expected = read(golden / "bfloat16" / "expected.safetensors")
model = tinymoe.Mixtral(config, params)
logits = model(expected["tokens"])


def off_by(found, wanted):
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


print(f"logits {logits.shape}: off by {off_by(logits, expected['logits']):.0e}")
loss, grads = model.loss_and_grads(expected["tokens"], expected["targets"], aux_loss_coef=0, z_loss_coef=0)
named = tinymoe.checkpoint.to_hf(grads, config)  # the way back: names, experts apart, order of rows
worst = max(off_by(grad, expected[f"grad.{name}"]) for name, grad in named.items())
print(f"loss {loss:.6f}, theirs {expected['loss']:.6f}; the worst of {len(named)} gradients is off by {worst:.0e}")
assert off_by(logits, expected["logits"]) < 2e-5
assert worst < 2e-4

# %%
# The library's loader, behind :meth:`tinymoe.Mixtral.from_pretrained`, gives the same bits, and what it saves again in
# bfloat16 are the bytes that transformers wrote.
library = tinymoe.Mixtral.from_pretrained(golden / "bfloat16")
assert all((library.params[name] == array).all() for name, array in params.items())
again = Path(folder.name) / "again"
tinymoe.checkpoint.save(again, library.params, config, dtype="bfloat16")
ours, originals = (safetensors.numpy.load_file(place / "model.safetensors") for place in (again, path.parent))
assert {name: array.tobytes() for name, array in ours.items()} == {n: a.tobytes() for n, a in originals.items()}
print("loaded and saved: every tensor has the bytes that it had")

# %%
# Files larger than memory
# ------------------------
# Most of a mixture is experts, and a token uses two of eight. So most of the file is not needed for a token.
KINDS = {"embedding, head": ("tok", "output"), "attention": ("attention.",), "experts": ("moe.w",), "rest": ("",)}


def shares(config):
    sizes = dict.fromkeys(KINDS, 0)
    for name, shape in config.parameter_shapes():
        kind = next(kind for kind, marks in KINDS.items() if any(mark in name for mark in marks))
        sizes[kind] += int(np.prod(shape))
    return {kind: size / sum(sizes.values()) for kind, size in sizes.items()}


large = tinymoe.MixtralConfig.mixtral_8x7b()
figure, axes = plt.subplots(figsize=(7, 1.9), layout="constrained")
for row, shape in enumerate((large, config)):
    left = 0.0
    for colour, (kind, share) in enumerate(shares(shape).items()):
        axes.barh(row, share, left=left, color=f"C{colour}", label=kind if row == 0 else None)
        left += share
axes.set_yticks([0, 1], ["Mixtral 8x7B", "this file"])
axes.set(xlim=(0, 1), xlabel="share of the parameters")
axes.set_title("Mixtral 8x7B is experts, nearly all of it", fontsize=10)
figure.legend(ncols=4, fontsize=8, loc="outside lower center")
plt.show()

total, active = large.count_parameters(), large.count_active_parameters()
used = active - large.vocab_size * large.dim + large.dim  # of the embedding only its row
print(f"8x7B in bfloat16: {2 * total / 1e9:.1f} GB on disk, of which a token reads {2 * used / 1e9:.1f} GB")

# %%
# A **memory map** makes the file an array without reading it. The system reads a page when it is first touched, and may
# forget it again. Since the header says where a tensor lies, one expert is one slice.
header, start = read_header(path)
mapped = np.memmap(path, np.uint8, "r")
entry = header["model.layers.1.block_sparse_moe.experts.2.w1.weight"]
begin, end = (start + offset for offset in entry["data_offsets"])
expert = widen(np.asarray(mapped[begin:end]).view(np.uint16)).reshape(entry["shape"])
print(f"expert 2 of layer 1: bytes {begin} to {end} of {len(mapped)}")
assert (expert == params["layers.1.moe.w1"][2]).all()
del mapped

lazy = tinymoe.Mixtral.from_pretrained(path.parent, mmap=True)  # tinymoe generate --mmap
assert (lazy(expected["tokens"]) == logits).all()

# %%
# Files are also cut, at a few gigabytes each, for downloads and file systems. An index says which **shard** has which
# tensor; every shard is a file of its own, with its own header.
index = json.loads((golden / "sharded" / "model.safetensors.index.json").read_text())
shards = sorted(set(index["weight_map"].values()))
joined = {name: array for shard in shards for name, array in read(golden / "sharded" / shard).items()}
print(len(shards), "shards,", len(joined), "tensors,", sum(array.nbytes for array in joined.values()), "bytes")
assert joined.keys() == index["weight_map"].keys()

# %%
# Broken on purpose
# -----------------
# **1. The order of rows forgotten.** Names and shapes fit, and the first token is right: position 0 is not turned, and
# it sees only itself. So a smoke test with one token passes. The rest is another model.
careless = tinymoe.Mixtral(config, translated(on_disk, reorder=False))(expected["tokens"])
by_position = np.linalg.norm(careless - logits, axis=2).mean(axis=0) / np.linalg.norm(logits, axis=2).mean(axis=0)
print("off by position:", by_position[:6].round(3))
assert by_position[0] < 1e-6
assert by_position[1:].min() > 1e-3

figure, axes = plt.subplots(figsize=(7, 2.6), layout="constrained")
axes.bar(range(len(by_position)), by_position)
axes.set(xlabel="position", ylabel="relative error")
axes.set_title("Without the reordering the logits are wrong everywhere but at position 0", fontsize=10)
plt.show()

# %%
# **2. A bit flipped on the way.** The format has no checksum. A changed exponent is still a number, and the file is as
# valid as before. So compare the hash that was published with the weights. A file that is cut short is another
# matter: the header says how long it must be.
damaged = Path(folder.name) / "damaged"
tinymoe.checkpoint.save(damaged, library.params, config, dtype="bfloat16")
file = damaged / "model.safetensors"
content = bytearray(file.read_bytes())
offset = read_header(file)[1] + read_header(file)[0]["model.norm.weight"]["data_offsets"][0] + 1
content[offset] ^= 0x01  # the second lowest bit of an exponent: four times as large, or a quarter
file.write_bytes(content)
changed = tinymoe.Mixtral.from_pretrained(damaged)(expected["tokens"])
print(f"one bit flipped: loads without a word, logits off by {off_by(changed, logits):.2f}")
assert off_by(changed, logits) > 1e-3

file.write_bytes(content[:-100])
try:
    tinymoe.Mixtral.from_pretrained(damaged)
    raise AssertionError("a truncated file was accepted")
except tinymoe.InputError as refused:
    print("cut short:", str(refused).replace(folder.name, "…"))

# %%
# **3. A checkpoint that is a program.** Before safetensors, weights were pickled, and files named ``.bin``, ``.pt``,
# ``.pth`` or ``.ckpt`` still may be. A pickle is not data but a list of instructions for rebuilding objects, and one of
# them is: *call this function with these arguments*. Whoever makes the file chooses the function.


class Weights:
    def __reduce__(self):  # how to rebuild me
        return print, ("this line was printed by opening a file; it could have been any command",)


harmless = pickle.dumps({"model.norm.weight": Weights()}, protocol=2)
pickle.loads(harmless)
instructions = [f"{operation.name} {argument or ''}".strip() for operation, argument, _ in pickletools.genops(harmless)]
print("what the file says:", [step for step in instructions if "print" in step or step == "REDUCE"])
assert "REDUCE" in instructions

# %%
# Nothing has to be used for that: it runs while the file is being opened, before anybody sees a tensor. Loaders can
# restrict which functions may be called, and should. A format that cannot say "call" needs no such list. The library
# does not unpickle, and says why:
pickled = Path(folder.name) / "pickled"
pickled.mkdir()
(pickled / "config.json").write_bytes((golden / "bfloat16" / "config.json").read_bytes())
(pickled / "pytorch_model.bin").write_bytes(harmless)
try:
    tinymoe.Mixtral.from_pretrained(pickled)
    raise AssertionError("a pickle was accepted")
except tinymoe.InputError as refused:
    print(str(refused).replace(folder.name, "…"))

# %%
# Remember
# --------
# * safetensors: eight bytes of length, a JSON header, raw data. It cannot run code, and has no checksum.
# * bfloat16 is the upper half of a float32: widen by a shift, narrow by rounding to even.
# * A checkpoint is arrays, names and a config; θ, ε, k and the number of heads are in no shape.
# * transformers' :math:`W_q` and :math:`W_k` have rotary pairs as halves. Test with more than one token.
# * Memory-mapped, a mixture reads what its router chooses.
# * A pickle is a program. Do not open one from strangers.
#
# **Ask yourself.** (a) Why are offsets counted from the end of the header? (b) What does a loader see if ``w1`` and
# ``w3`` are exchanged? (c) Which of 256, 257 and 258 are bfloat16 numbers? (d) Why is :math:`W_v` not reordered? (e) A
# file has no ``lm_head.weight``. What might the config say?
#
# Exercises
# ---------
# 1. ``narrow`` is wrong for some NaNs: find bits for which it returns an infinity, and bits for which it returns zero,
#    and repair it.
# 2. Read ``tests/golden/mistral_layout``, which is in Mistral's own layout and names. Which step falls away? Compare
#    the logits with its ``expected.safetensors``.
# 3. float16 has 5 bits of exponent and 10 of fraction. Compare the error of both formats on normally distributed
#    numbers, and find a number that only bfloat16 can hold.

# %%
# .. raw:: html
#
#    <details class="answers"><summary>Answers</summary>

# %%
# Ask yourself: (a) else the numbers in the header would depend on its length, which depends on them;
# (b) nothing, both are (F, D), and the model is wrong; (c) 256 and 258: from 256 on they are 2 apart; (d) values are
# not rotated, and the order of their elements must be that of :math:`W_o`'s columns; (e) ``tie_word_embeddings``: the
# embedding serves as the head.
#
# 1. A NaN whose fraction is at most 0x8000 loses it in rounding and becomes an infinity. One whose upper half is 0x7FFF
#    or 0xFFFF is rounded up past the end, and becomes −0 or +0. Keep NaNs out of the rounding: cut them off and set a
#    bit of the fraction.
quiet = np.array([0x7F800001], np.uint32).view(np.float32)
assert np.isnan(quiet).all()
assert np.isinf(widen(narrow(quiet))).all()
assert (widen(narrow(np.array([0x7FFFFFFF], np.uint32).view(np.float32))) == 0).all()


def narrow_all(values):
    return np.where(np.isnan(values), (values.view(np.uint32) >> 16 | 0x0040).astype(np.uint16), narrow(values))


assert np.isnan(widen(narrow_all(quiet))).all()
assert (narrow_all(many) == narrow(many)).all()

# %%
# 2. The reordering: Mistral pairs neighbours, as we do. Only the names differ, and the library knows them.
mistral = tinymoe.Mixtral.from_pretrained(golden / "mistral_layout")
raw = read(golden / "mistral_layout" / "consolidated.safetensors")
assert (mistral.params["layers.0.attention.wq"] == raw["layers.0.attention.wq.weight"]).all()
wanted = read(golden / "mistral_layout" / "expected.safetensors")
print(f"off by {off_by(mistral(wanted['tokens']), wanted['logits']):.0e}")
assert off_by(mistral(wanted["tokens"]), wanted["logits"]) < 2e-5

# %%
# 3. Three more bits of fraction make float16's spacing an eighth where it reaches (the largest error of a sample need
#    not show all of that). It ends at 65,504; bfloat16 holds :math:`2^{17}` exactly.
normal = many[:100_000]
errors = [abs(normal - rounded).max() for rounded in (normal.astype(np.float16), widen(narrow(normal)))]
print(f"largest error on normally distributed numbers: float16 {errors[0]:.5f}, bfloat16 {errors[1]:.5f}")
with np.errstate(over="ignore"):
    large_number = np.array([2**17], np.float32)
    print("131,072 becomes", large_number.astype(np.float16)[0], "and", widen(narrow(large_number))[0])
    assert np.isinf(large_number.astype(np.float16)).all()
    assert widen(narrow(large_number)) == large_number
assert errors[0] < errors[1] / 4
folder.cleanup()

# %%
# .. raw:: html
#
#    </details>

# %%
# **Next:** a model of this kind can be opened; how fast can it run? :doc:`Lesson 18 </lessons/lesson_18_roofline>`
# counts bytes and operations.
