"""Instruction tuning: log-probabilities by brute force, gradients by differences, files by line, runs by bits."""

import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import signal
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
from emulation import EVERYWHERE
from gradients import assert_close, check_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from strategies import SMALL, configs, random_params, rngs

import tinymoe.model as model_module
from tinymoe import InputError, Mixtral, MixtralConfig, cli, instruct, runs, training
from tinymoe.cuda import device
from tinymoe.examples import ETX, KEYS, Example, Shuffled, padded, pairs, read_examples
from tinymoe.reference.loss import IGNORED
from tinymoe.tokenizer import ByteTokenizer

MICRO = MixtralConfig(
    dim=16, n_layers=2, hidden_dim=24, n_heads=2, n_kv_heads=1, vocab_size=256, num_experts=4, context_len=64
)


def small_model(config=SMALL, seed=0, **changes):
    return Mixtral(config, random_params(config, np.random.default_rng(seed)), **dict(num_workers=1) | changes)


@st.composite
def sequences(draw, vocab_size, most=6):
    """Draw prompts and answers of any lengths."""
    rng = draw(rngs)
    sizes = draw(st.lists(st.tuples(st.integers(1, most), st.integers(1, most)), min_size=1, max_size=4))
    return [tuple(rng.integers(vocab_size, size=n) for n in pair) for pair in sizes]


def some_pairs(vocab_size=7, count=3, seed=1):
    rng = np.random.default_rng(seed)
    examples = [
        Example(rng.integers(vocab_size, size=2 + i), tuple(rng.integers(vocab_size, size=(2, 1 + i))))
        for i in range(count)
    ]
    return pairs(examples, rng.normal(-3, 1, (2, count)))


# The model's log-probabilities and their backward.


@given(configs(), st.data())
@settings(max_examples=15)
def test_log_probability_of_an_answer_is_that_of_its_tokens_one_after_another(config, data):
    model = Mixtral(config, random_params(config, data.draw(rngs)), num_workers=1)
    given_ones = data.draw(sequences(config.vocab_size))
    found = model.log_probs(*padded(given_ones)[:2])
    for (prompt, answer), log_prob in zip(given_ones, found):
        text, expected = list(prompt), 0.0
        for token in answer:
            logits = model(np.array([text]))[0, -1]
            expected += logits[token] - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
            text.append(token)
        assert_close(log_prob, expected, 1e-10, floor=1.0)


def assert_gradients_are_differences(model, batch, loss_of, **how):
    """Compare gradients through `log_probs_and_backward` with differences of a loss, balance losses included.

    ``loss_of`` takes log-probabilities and gives the loss and its gradient by them.
    """
    names, loads = list(model.params), []

    def loss_and_grads(model):
        log_probs, backward = model.log_probs_and_backward(*batch[:3])
        loss, dlog_probs = loss_of(log_probs)
        grads = backward(dlog_probs)
        loads.append(model.losses.load)
        config, terms = model.config, model.losses
        balance = config.aux_loss_coef * terms.switch.sum() + config.z_loss_coef * terms.z.sum()
        return loss + balance / len(config.moe_layers), grads

    def loss(*arrays):
        return loss_and_grads(Mixtral(model.config, dict(zip(names, arrays)), num_workers=1))[0]

    grads = loss_and_grads(model)[1]
    check_gradients(loss, [model.params[name] for name in names], [grads[name] for name in names], **how)
    assert all(np.array_equal(load, loads[0]) for load in loads), "a step changed a token's experts: another seed"


@pytest.mark.parametrize("changes", [{}, dict(moe_every=2), dict(tie_embeddings=True, sliding_window=2)])
def test_gradient_of_any_loss_on_log_probabilities_equals_differences(changes):
    weights = np.array([0.7, -1.3, 0.0, 2.0, 0.1, -0.4])
    model = small_model(dataclasses.replace(SMALL, **changes))
    assert_gradients_are_differences(model, some_pairs(), lambda log_probs: (weights @ log_probs, weights), full=12)


@pytest.mark.parametrize("beta", [0.1, 3.0])
def test_gradient_of_dpo_through_the_model_equals_differences(beta):
    batch = some_pairs()

    def loss_of(log_probs):
        loss, saved = instruct.dpo_loss(log_probs.reshape(2, -1), batch.references, beta)
        return loss, instruct.dpo_loss_backward(1.0, saved).ravel()

    assert_gradients_are_differences(small_model(), batch, loss_of, full=12)


def test_gradient_of_the_mean_log_probability_is_that_of_the_cross_entropy():
    batch, model = some_pairs(), small_model()
    count = np.count_nonzero(batch.targets != IGNORED)
    log_probs, backward = model.log_probs_and_backward(*batch[:3])
    grads = backward(np.full(len(log_probs), -1 / count))
    loss, expected = model.loss_and_grads(batch.inputs, batch.targets, lengths=batch.lengths)
    assert_close(model.losses.cross_entropy, -log_probs.sum() / count, 1e-12)
    assert loss > model.losses.cross_entropy
    for name, grad in grads.items():
        assert_close(grad, expected[name], 1e-12)


def test_log_probabilities_are_without_noise_and_capacity_so_that_a_policy_starts_at_its_reference():
    batch = some_pairs()
    varied = dataclasses.replace(SMALL, router_jitter=0.3, noisy_top_k=True, capacity_factor=0.5)
    model = small_model(varied)
    log_probs, backward = model.log_probs_and_backward(*batch[:3])
    assert_close(log_probs, model.log_probs(*batch[:2]), 1e-13)
    grads = backward(np.ones(len(log_probs)))
    assert list(grads) == list(model.params)
    for name, grad in grads.items():
        assert grad.any() != name.endswith("moe.noise"), name


@pytest.mark.parametrize("fill", [0, 5])
def test_padding_has_no_part_in_losses_gradients_and_load(fill):
    model = small_model()
    tokens, targets = np.random.default_rng(0).integers(7, size=(2, 1, 5))
    expected_loss, expected = model.loss_and_grads(tokens, targets)
    terms = model.losses
    longer = np.concatenate([tokens, np.full((1, 4), fill)], axis=1)
    ignored = np.concatenate([targets, np.full((1, 4), IGNORED)], axis=1)
    loss, grads = model.loss_and_grads(longer, ignored, lengths=[5])
    assert_close(loss, expected_loss, 1e-13)
    for term, expected_term in zip(model.losses, terms):
        assert_close(term, expected_term, 1e-13)
    for name, grad in grads.items():
        assert_close(grad, expected[name], 1e-12)
    assert_close(model.log_probs(longer, ignored), model.log_probs(tokens, targets), 1e-13)
    counted, _ = model.loss_and_grads(longer, ignored)
    assert abs(counted - loss) > 1e-3, "without the lengths, padding counts in the balance losses"


def test_each_sequence_has_a_length_of_its_own():
    tokens, targets = np.random.default_rng(0).integers(7, size=(2, 2, 9))
    targets[0, 5:] = IGNORED
    found = []
    for fill in (0, 5):
        tokens[0, 5:] = fill
        model = small_model()
        loss, grads = model.loss_and_grads(tokens, targets, lengths=[5, 9])
        found.append([loss, model.losses.load, *grads.values()])
    for one, other in zip(*found):
        assert_close(one, other, 1e-13)


@pytest.mark.parametrize("lengths", [[0, 5], [5, 6], [5], [[5, 5]]])
def test_lengths_out_of_range_are_refused(lengths):
    tokens = np.zeros((2, 5), int)
    with pytest.raises(InputError, match="lengths must be 2 numbers from 1 to 5"):
        small_model().loss_and_grads(tokens, tokens, lengths=lengths)


@pytest.mark.parametrize("workers", [2, 3, 5])
def test_number_of_workers_changes_nothing_beyond_rounding(workers):
    batch, weights = some_pairs(), np.arange(6.0)
    log_probs, backward = small_model().log_probs_and_backward(*batch[:3])
    expected = backward(weights)
    with mock.patch.object(model_module, "LEAST_PART", 1):
        several, backward = small_model(num_workers=workers).log_probs_and_backward(*batch[:3])
        grads = backward(weights)
    assert_close(several, log_probs, 1e-13)
    for name, grad in grads.items():
        assert_close(grad, expected[name], 1e-12)


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 6e-2)])
def test_kernels_give_the_reference_s_log_probabilities_and_gradients(where, dtype, tolerance):
    config = dataclasses.replace(SMALL, num_experts=2)  # top-2 of 2: rounding cannot change a choice
    drawn = random_params(config, np.random.default_rng(0)).items()
    params = {name: p.astype(ml_dtypes.bfloat16).astype(np.float32) for name, p in drawn}
    batch, weights = some_pairs(), np.array([1.0, 2.0, 0.5, -1.0, -2.0, 0.25])
    log_probs, backward = Mixtral(config, params, num_workers=1).log_probs_and_backward(*batch[:3])
    expected = backward(weights)
    with device.using(where):
        model = Mixtral(config, {name: p.astype(dtype) for name, p in params.items()}, backend="cuda")
        found, backward = model.log_probs_and_backward(*batch[:3])
        assert_close(found, log_probs, tolerance)
        assert_close(model.log_probs(*batch[:2]), log_probs, tolerance)
        grads, largest = backward(weights), max(np.linalg.norm(grad) for grad in expected.values())
        for name, grad in expected.items():
            assert_close(model.host(grads[name]), grad, tolerance, floor=0.3 * largest)


# The loss of DPO.


def test_dpo_loss_by_hand():
    log_probs, references = np.array([[-1.0, -4.0], [-3.0, -2.0]]), np.array([[-2.0, -2.0], [-2.0, -2.0]])
    loss, saved = instruct.dpo_loss(log_probs, references, 0.5)
    assert saved.margins.tolist() == [1.0, -1.0]  # 0.5 · (1 − −1), 0.5 · (−2 − 0)
    assert loss == pytest.approx((math.log1p(math.exp(-1)) + math.log1p(math.e)) / 2)
    pull = 0.5 / 2 / np.array([1 + math.e, 1 + math.exp(-1)])  # β σ(−m) / B
    assert_close(instruct.dpo_loss_backward(1.0, saved), [-pull, pull], 1e-14)


def test_dpo_loss_of_the_reference_model_is_ln_2():
    log_probs = np.random.default_rng(0).normal(-9, 4, (2, 5))
    loss, saved = instruct.dpo_loss(log_probs, log_probs, 0.1)
    assert loss == pytest.approx(math.log(2))
    assert instruct.preferred(np.stack([saved.margins, 0 * saved.margins])) == 0.5


@given(rngs, st.integers(1, 6), st.sampled_from([0.01, 0.3, 4.0]), st.floats(-2, 2))
def test_dpo_backward_equals_differences(rng, count, beta, dloss):
    log_probs, references = rng.normal(-5, 3, (2, 2, count))
    _, saved = instruct.dpo_loss(log_probs, references, beta)
    grad = instruct.dpo_loss_backward(dloss, saved)
    check_gradients(lambda moved: dloss * instruct.dpo_loss(moved, references, beta)[0], [log_probs], [grad])


@pytest.mark.parametrize(("margin", "loss", "pull"), [(1e5, 0.0, 0.0), (-1e5, 1e5, 1.0)])
def test_huge_margins_do_not_overflow(margin, loss, pull):
    found, saved = instruct.dpo_loss(np.array([[margin], [0.0]]), np.zeros((2, 1)), 1.0)
    assert found == pytest.approx(loss)
    assert_close(instruct.dpo_loss_backward(1.0, saved), [[-pull], [pull]], 1e-12)


# Files and batches.


def written(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def sft_lines(count=30):
    return [
        {"prompt": f"upper: {chr(97 + i % 26) * (1 + i // 26)}\n", "answer": chr(65 + i % 26)} for i in range(count)
    ]


def dpo_lines(count=30):
    return [
        {"prompt": line["prompt"], "chosen": line["answer"] + ".", "rejected": line["answer"]}
        for line in sft_lines(count)
    ]


GOOD = {"sft": '{"prompt": "a", "answer": "b"}', "dpo": '{"prompt": "a", "chosen": "b", "rejected": "c"}'}


@pytest.mark.parametrize(
    ("objective", "line", "says"),
    [
        ("sft", "{", "not valid JSON"),
        ("sft", "prompt: a", "not valid JSON"),
        ("sft", "[" * 100000, "not valid JSON"),
        ("sft", '["a", "b"]', "no JSON object; give an object of prompt and answer"),
        ("sft", '{"prompt": "a"}', "lacks 'answer'"),
        ("sft", '{"answer": "a"}', "lacks 'prompt'"),
        ("sft", '{"prompt": "a", "answer": "b", "id": 3}', "unknown key 'id'"),
        ("sft", GOOD["dpo"], "lacks 'answer'; give an object of prompt and answer"),
        ("dpo", GOOD["sft"], "lacks 'chosen'; give an object of prompt, chosen and rejected"),
        ("sft", '{"prompt": 1, "answer": "b"}', "'prompt' is no string"),
        ("sft", '{"prompt": "a", "answer": null}', "'answer' is no string"),
        ("sft", '{"prompt": "", "answer": "b"}', "'prompt' is empty"),
        ("sft", '{"prompt": "a", "answer": ""}', "'answer' is empty"),
        ("sft", '{"prompt": "a", "answer": "b\\u0003c"}', "'answer' holds .*which ends an answer"),
        (
            "sft",
            json.dumps({"prompt": "a" * 9, "answer": "b" * 8}),
            "'answer' have 18 tokens .* more than --seq-len 16",
        ),
        ("dpo", '{"prompt": "a", "chosen": "b", "rejected": "b"}', "are the same"),
        ("dpo", json.dumps({"prompt": "a", "chosen": "b", "rejected": "c" * 16}), "'rejected' have 18 tokens"),
        ("sft", b'{"prompt": "a", "answer": "\xff"}', "byte 28 is not UTF-8"),
    ],
)
def test_a_line_that_cannot_be_used_is_named_by_its_number(tmp_path, objective, line, says):
    path = tmp_path / "examples.jsonl"
    line = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(b"\n".join([GOOD[objective].encode(), b"", b"  ", line, GOOD[objective].encode()]))
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}, line 4: [^\n]*{says}"):
        read_examples(path, objective, ByteTokenizer(), 16)


def test_files_without_use_are_refused(tmp_path):
    with pytest.raises(InputError, match="cannot read"):
        read_examples(tmp_path / "nosuch.jsonl", "sft", ByteTokenizer(), 16)
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(InputError, match="holds no line"):
        read_examples(tmp_path / "empty.jsonl", "sft", ByteTokenizer(), 16)
    with pytest.raises(InputError, match="a single prompt"):
        read_examples(written(tmp_path / "one.jsonl", sft_lines(1) * 3), "sft", ByteTokenizer(), 16)


@given(st.integers(2, 60), st.integers(1, 3))
def test_no_prompt_is_on_both_sides_and_files_that_share_prompts_agree(tmp_path_factory, count, copies):
    folder = tmp_path_factory.mktemp("examples")
    sft = read_examples(written(folder / "sft", sft_lines(count) * copies), "sft", ByteTokenizer(), 32)
    dpo = read_examples(written(folder / "dpo", dpo_lines(count)[::-1]), "dpo", ByteTokenizer(), 32)
    sides = [[{e.prompt.tobytes() for e in side} for side in (data.train, data.held_out)] for data in (sft, dpo)]
    assert sides[0] == sides[1]
    assert not sides[0][0] & sides[0][1]
    assert all(sides[0])
    assert len(sft.train) + len(sft.held_out) == count * copies
    by_hash = {prompt for prompt in sides[0][0] | sides[0][1] if hashlib.sha256(prompt).digest()[0] < 26}
    assert sides[0][1] == by_hash or not 0 < len(by_hash) < count


@pytest.mark.parametrize("below", [True, False])
def test_where_all_or_no_prompts_would_be_held_out_the_one_with_the_smallest_hash_is(tmp_path, below):
    def digest(prompt):
        return hashlib.sha256(prompt.encode()).digest()

    prompts = [prompt for prompt in map(str, range(500)) if (digest(prompt)[0] < 26) == below][:5]
    lines = [{"prompt": prompt, "answer": "x"} for prompt in prompts]
    data = read_examples(written(tmp_path / "sft", lines), "sft", ByteTokenizer(), 16)
    assert [bytes(e.prompt).decode() for e in data.held_out] == [min(prompts, key=digest)]
    assert len(data.train) == 4


def test_an_example_may_be_as_long_as_a_sequence_and_no_longer(tmp_path):
    path = written(tmp_path / "sft", [{"prompt": "abc", "answer": "d" * 12}, {"prompt": "b", "answer": "c"}])
    assert len(read_examples(path, "sft", ByteTokenizer(), 16).train) == 1  # 3 + 12 and the end
    with pytest.raises(InputError, match=r"line 1: .*have 16 tokens with the end, more than --seq-len 15"):
        read_examples(path, "sft", ByteTokenizer(), 15)


def test_a_batch_predicts_each_token_of_the_answers_and_nothing_else():
    batch = padded([(np.array([1, 2, 3]), np.array([4, 5])), (np.array([6]), np.array([7]))])
    assert batch.inputs.tolist() == [[1, 2, 3, 4], [6, 0, 0, 0]]
    assert batch.targets.tolist() == [[IGNORED, IGNORED, 4, 5], [7, IGNORED, IGNORED, IGNORED]]
    assert batch.lengths.tolist() == [4, 1]


def test_answers_end_with_etx_or_with_the_tokenizer_s_own_end(tmp_path):
    path = written(tmp_path / "sft", sft_lines())
    for tokenizer, end in ((ByteTokenizer(), ETX), (ByteTokenizer(eos_token=0), 0)):
        data = read_examples(path, "sft", tokenizer, 32)
        for example in [*data.train, *data.held_out]:
            assert example.answers[0][-1] == end
            assert bytes(example.answers[0][:-1].astype(np.uint8)).isupper()


def test_a_tokenizer_s_bos_comes_before_the_prompt_alone(tmp_path):
    class WithBos(ByteTokenizer):
        def encode(self, text):
            return np.append(255, super().encode(text))

    data = read_examples(written(tmp_path / "sft", sft_lines()), "sft", WithBos(), 32)
    assert all(e.prompt[0] == 255 and 255 not in e.prompt[1:] and 255 not in e.answers[0] for e in data.train)


@given(st.integers(1, 30), st.integers(1, 9), st.integers(0, 5))
def test_every_example_comes_once_an_epoch_in_whatever_order_batches_are_asked_for(count, batch_size, seed):
    def drawn():
        return Shuffled(count, batch_size, seed, lambda chosen: chosen.tolist())

    batches, steps = drawn(), 3 * count
    stream = [example for step in range(steps) for example in batches[step]]
    assert all(sorted(stream[i : i + count]) == list(range(count)) for i in range(0, 3 * count, count))
    assert drawn()[steps - 1] == batches[steps - 1]


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [Shuffled(30, 30, seed, lambda chosen: tuple(chosen))[epoch] for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4


def test_metrics_count_the_tokens_of_all_accumulated_batches_without_padding(base, files):
    options = training.Options(batch_size=4, seq_len=32, accumulate=3)
    task = instruct.sft_task(read_examples(files["sft"], "sft", ByteTokenizer(), 32), options)
    model = Mixtral.from_pretrained(base)
    _, line = training._gradients(model, task.batches, 2, options, task.gradients)
    assert line["tokens"] == sum(task.batches[batch].lengths.sum() for batch in (6, 7, 8))


# Runs.


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    Mixtral.init(MICRO).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return {"sft": written(folder / "sft.jsonl", sft_lines()), "dpo": written(folder / "dpo.jsonl", dpo_lines())}


def create(directory, objective, base, files, **options):
    wanted = dict(batch_size=4, seq_len=32, eval_every=3, save_every=3, warmup=2, learning_rate=1e-3) | options
    return instruct.create(
        directory, objective, str(base), str(files[objective]), training.Options(**wanted), num_workers=2
    )


def state(run):
    return {name: array.tobytes() for name, array in load_file(run.directory / runs.STATE).items()}


def without_speed(run):
    lines = runs.read_metrics(run.directory / runs.METRICS)
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]


@pytest.mark.parametrize("objective", KEYS)
def test_a_run_that_is_stopped_anywhere_ends_like_one_that_never_was(tmp_path, base, files, objective):
    moved = shutil.copytree(base, tmp_path / "moved")
    whole = create(tmp_path / "whole", objective, moved, files, steps=10, accumulate=2)
    instruct.train(*whole)
    cut, examples = create(tmp_path / "cut", objective, moved, files, steps=10, accumulate=2)
    for stop_after in (1, 4, 8):

        def interrupt(line, stop_after=stop_after):
            if line["step"] == stop_after:
                os.kill(os.getpid(), signal.SIGINT)

        cut = runs.open_run(cut.directory)
        assert instruct.train(cut, instruct.examples_of(cut), interrupt)[1] == stop_after
        shutil.rmtree(moved, ignore_errors=True)  # from the first save on, nobody needs it
    instruct.train(runs.open_run(cut.directory), examples)
    assert state(cut) == state(whole[0])
    assert without_speed(cut) == without_speed(whole[0])


def test_sft_learns_the_answers_and_writes_them(tmp_path, base):
    few = {"sft": written(tmp_path / "sft.jsonl", sft_lines(8))}
    run, examples = create(tmp_path / "run", "sft", base, few, steps=200, learning_rate=1e-2, save_every=200)
    model, _ = instruct.train(run, examples)
    lines = runs.read_metrics(run.directory / runs.METRICS)
    assert lines[-1]["train_loss"] < 0.2 * lines[0]["train_loss"]
    assert {"val_loss", "expert_load"} <= lines[-1].keys()
    prompts, accepted = [e.prompt for e in examples.train], [e.answers for e in examples.train]
    assert instruct.exact_match(model, prompts, accepted, ETX) == 1
    assert instruct.exact_match(Mixtral.from_pretrained(base), prompts, accepted, ETX) == 0
    longer = instruct.answers(model, prompts, 9, ETX)
    assert all(np.array_equal(answer, of[0]) for answer, of in zip(longer, accepted)), "the end stops an answer"


def test_dpo_prefers_the_chosen_answers_to_what_the_reference_did(tmp_path, base, files):
    run, examples = create(tmp_path / "run", "dpo", base, files, steps=60, learning_rate=3e-3, save_every=60)
    model, _ = instruct.train(run, examples)
    lines = runs.read_metrics(run.directory / runs.METRICS)
    assert lines[0]["train_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert lines[-1]["val_preference_accuracy"] >= 0.95
    assert lines[-1]["val_margin"] > 0.3
    assert lines[-1]["val_loss"] < lines[2]["val_loss"] < math.log(2)
    reference = load_file(run.directory / instruct.REFERENCE)
    of_base = instruct.log_probs(Mixtral.from_pretrained(base, num_workers=2), examples.held_out)
    assert np.array_equal(reference["held_out"], of_base)
    loss, saved = instruct.dpo_loss(instruct.log_probs(model, examples.held_out), of_base, 0.1)
    assert lines[-1]["val_loss"] == pytest.approx(loss)
    assert lines[-1]["val_margin"] == pytest.approx(saved.margins.mean())


def test_greedy_answers_of_prompts_of_all_lengths_are_each_their_own(base):
    model, rng = Mixtral.from_pretrained(base), np.random.default_rng(0)
    prompts = [rng.integers(256, size=n) for n in (5, 2, 9, 5, 2, 1, 60)]
    found = instruct.answers(model, prompts, 6, ETX)
    for prompt, answer in zip(prompts, found):
        assert len(answer) == min(6, MICRO.context_len - len(prompt))
        assert np.array_equal(answer, instruct.answers(model, [prompt], 6, ETX)[0])
    assert instruct.exact_match(model, prompts, [[found[0]], [], [found[1], found[2]], *[[]] * 4], ETX) == 2 / 7


def test_a_model_that_changed_before_the_first_save_is_refused(tmp_path, base, files):
    moved = shutil.copytree(base, tmp_path / "moved")
    run, examples = create(tmp_path / "run", "sft", moved, files, steps=3)
    Mixtral.init(MICRO, seed=1).save_pretrained(moved)
    with pytest.raises(InputError, match="has changed since the run was made from it"):
        instruct.train(run, examples)


@pytest.mark.parametrize("damage", [b"junk", None])
def test_references_that_are_lost_are_refused(tmp_path, base, files, damage):
    run, examples = create(tmp_path / "run", "dpo", base, files, steps=4)
    instruct.train(run, examples)
    path = run.directory / instruct.REFERENCE
    path.unlink() if damage is None else path.write_bytes(damage)
    with pytest.raises(InputError, match=r"reference\.safetensors cannot be resumed from"):
        instruct.train(run, examples)


# The command.

SHORT = ["--steps", "4", "--batch-size", "4", "--eval-every", "2", "--seq-len", "32"]


def refused(capsys, *arguments):
    try:
        status = cli.main([str(argument) for argument in arguments])
    except SystemExit as exit:
        status = exit.code
    out, err = capsys.readouterr()
    assert status == 2, out + err
    assert re.fullmatch(r"tinymoe: error: [^\n]+\n", err), err
    return err


@pytest.mark.parametrize("objective", KEYS)
def test_the_command_trains_resumes_and_answers(tmp_path, base, files, capsys, objective):
    run = tmp_path / "run"
    start = ["train", "--objective", objective, "--init", str(base), "--data", str(files[objective]), "--out", str(run)]
    assert cli.main([*start, *SHORT]) == 0
    out = capsys.readouterr().out
    assert "greedy answers that match" in out
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["objective"]["name"] == objective
    assert manifest["objective"]["init"] == str(base)
    assert manifest["objective"].get("beta") == (0.1 if objective == "dpo" else None)
    assert json.loads((run / "config.json").read_text())["eos_token_id"] == ETX
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    before = (run / "model.safetensors").read_bytes()
    assert cli.main(["train", "--resume", str(run)]) == 0
    assert (run / "model.safetensors").read_bytes() == before
    assert cli.main(["generate", str(run), "upper: a\n", "--max-new-tokens", "4"]) == 0
    assert "already holds a run" in refused(capsys, *start, *SHORT)
    assert "name at least one file" in refused(capsys, "eval", run)


def test_resume_refuses_examples_that_changed(tmp_path, base, capsys):
    path, run = written(tmp_path / "sft.jsonl", sft_lines()), tmp_path / "run"
    start = ["train", "--objective", "sft", "--init", str(base), "--data", str(path), "--out", str(run)]
    assert cli.main([*start, *SHORT]) == 0
    written(path, sft_lines(29))
    assert "has changed" in refused(capsys, "train", "--resume", run)
    for flag in ("--objective=dpo", f"--init={base}", "--beta=1"):
        assert "cannot go with --resume" in refused(capsys, "train", "--resume", run, flag)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--objective sft --data {sft}", "needs --init"),
        ("--objective sft --init {base}", "needs --data FILE.jsonl"),
        ("--objective sft --init {base} --data {sft} {dpo}", "one file"),
        ("--objective sft --init {base} --data {dpo}", "line 1: it lacks 'answer'"),
        ("--objective dpo --init {base} --data {sft}", "line 1: it lacks 'chosen'"),
        ("--objective dpo --init /nosuch --data {dpo}", "/nosuch"),
        ("--objective dpo --init {base} --data /nosuch.jsonl", "/nosuch.jsonl"),
        ("--objective dpo --init {base} --data {dpo} --beta 0", "beta"),
        ("--objective sft --init {base} --data {sft} --beta 0.5", "--beta goes with"),
        ("--objective sft --init {base} --data {sft} --config tiny", "--config goes with pre-training"),
        ("--objective sft --init {base} --data {sft} --minutes 1", "--minutes goes with pre-training"),
        ("--objective sft --init {base} --data {sft} --seq-len 65", "exceeds the context of 64"),
        ("--objective sft --init {base} --data {sft} --seq-len 9", r"line 1: .*more than --seq-len 9"),
        ("--objective ppo", "ppo"),
        ("--init {base}", "go with --objective sft or dpo"),
        ("--beta 0.2", "go with --objective sft or dpo"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(tmp_path, base, files, capsys, arguments, says):
    new = tmp_path / "new"
    words = [word.format(base=base, **files) for word in arguments.split()]
    assert re.search(says, refused(capsys, "train", *SHORT, *words, "--out", new))
    assert not new.exists()
