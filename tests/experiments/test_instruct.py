"""The experiment in quick mode: it runs, says what it must, repeats itself, and draws."""

import json

from tinymoe.experiments import instruct


def test_quick_mode_gives_every_number_and_gives_it_again(tmp_path):
    numbers = instruct.run(seed=3, quick=True)
    assert json.loads(json.dumps(numbers)) == json.loads(json.dumps(instruct.run(seed=3, quick=True)))
    assert tuple(numbers["stages"]) == instruct.STAGES
    for stage in numbers["stages"].values():
        assert stage["text_loss"] > 0
        assert 0 <= stage["preferred_form"] <= stage["exact_match"] <= 1
    for stage in ("base", "sft"):  # there is nothing yet to be compared with
        assert (numbers["stages"][stage]["implicit_accuracy"], numbers["stages"][stage]["margin"]) == (0.5, 0.0)
    assert numbers["curves"]["dpo"]["val_preference_accuracy"][-1] == numbers["stages"]["dpo"]["implicit_accuracy"]
    assert len(numbers["reached"]) == 2
    instruct.plot(numbers).savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_half_of_the_answers_end_in_a_full_stop_and_both_forms_are_right(tmp_path):
    instruct.write_examples(tmp_path, 0, 200, instruct.synthetic(0, 2048))
    sft = [json.loads(line) for line in (tmp_path / "sft.jsonl").read_text().splitlines()]
    dpo = {line["prompt"]: line for line in map(json.loads, (tmp_path / "dpo.jsonl").read_text().splitlines())}
    instructions = [line for line in sft if line["prompt"] in dpo]
    assert len(dpo) == len(instructions) == 200 * len(instruct.TASKS)
    assert len(sft) == 200 * (len(instruct.TASKS) + 2)
    stops = 0
    for line in instructions:
        task, word = line["prompt"].rstrip("\n").split(": ")
        right = instruct.TASKS[task](word)
        pair = dpo[line["prompt"]]
        assert (pair["chosen"], pair["rejected"]) == (right + ".", right)
        assert line["answer"] in (right, right + ".")
        stops += line["answer"].endswith(".")
    assert 0.4 < stops / len(instructions) < 0.6
