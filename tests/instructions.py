"""Examples to fine-tune on: instructions that a small model can learn, and a file of them."""

import json


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
