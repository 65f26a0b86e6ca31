"""Writes tests/data/verify/*.npz by the script that `fastlm verify --script` prints, for checkpoints of every kind of model.

Run with a Python that has torch and transformers, and fastlm on its path. Needed only when the script is changed.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from fastlm.cli.verify import SCRIPT

DATA = Path(__file__).parent
FOLDERS = {
    "t5": "t5/v1.0",
    "switch": "switch/tied",
    "bert": "encoders/bert.masked_lm",
    "albert": "encoders/albert.masked_lm",
    "electra": "encoders/electra.replaced_token",
    "roberta": "encoders/roberta.bare",
    "distilbert": "encoders/distilbert.masked_lm",
    "xlnet": "xlnet/bi",
    "mixtral": "experts/mixtral",
    "gpt2": "models/gpt2",
}

if __name__ == "__main__":
    (DATA / "verify").mkdir(exist_ok=True)
    for name, folder in FOLDERS.items():
        subprocess.run([sys.executable, "-c", SCRIPT, DATA / folder, DATA / "verify" / f"{name}.npz"], check=True)
