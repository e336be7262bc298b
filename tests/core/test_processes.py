"""Two processes that train together, stopped and resumed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from toy_runs import STEPS, same, weights

pytest.importorskip("lightning", reason="training needs the extra 'train'")

SCRIPT = f"""
import sys
from pathlib import Path
import torch
import toy_runs
from oodcore.training import train

torch.set_num_threads(1)
folder = Path(sys.argv[1])
config = toy_runs.config_of(*toy_runs.ALL, checkpoint_every=1, epochs=2)
train(config, folder / "whole")
train(config, folder / "resumed", stop_after={STEPS + 1})
train(config, folder / "resumed", resume=True)
"""


def test_two_processes_train_together(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", str(tmp_path / "script.py"), str(tmp_path)),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)},
    )
    assert done.returncode == 0, done.stderr
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "resumed"))
    record = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert record["processes"] == 2
    metrics = [(tmp_path / name / "metrics.csv").read_text() for name in ("whole", "resumed")]
    assert metrics[0] == metrics[1]
