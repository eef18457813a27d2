"""Files of examples and their batches: a line that cannot be used is named, every example comes once an epoch."""

import hashlib
import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from instructions import dpo_lines, sft_lines, written

from tinymoe import InputError
from tinymoe.examples import ETX, Shuffled, padded, read_examples
from tinymoe.reference.loss import IGNORED
from tinymoe.tokenizer import ByteTokenizer

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
