"""Make this folder's model: train on the standard library, then write the weights in bfloat16, half the bytes.

Run as ``python lessons/checkpoint/make.py``; it takes some five minutes on two cores. Another patch version of Python
has another library, and so gives another model.
"""

import json
import tempfile
from pathlib import Path

from tinymoe import Mixtral, MixtralConfig, checkpoint
from tinymoe.cli import main

FOLDER = Path(__file__).parent
SHAPE = dict(dim=64, n_layers=3, head_dim=16, hidden_dim=128, n_heads=4, n_kv_heads=2, vocab_size=256)

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        config, run = Path(scratch) / "config.json", Path(scratch) / "run"
        config.write_text(json.dumps(MixtralConfig(**SHAPE, sliding_window=128).to_hf()))
        if main(["train", "--config", str(config), "--steps", "3000", "--workers", "1", "--out", str(run)]) == 0:
            model = Mixtral.from_pretrained(run)
            checkpoint.save(FOLDER, model.params, model.config, dtype="bfloat16")
