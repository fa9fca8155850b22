"""A Python that takes long to start: in a job it stands still while the folder SLOW_PYTHON has a file ``hold``."""

import os
import time
from pathlib import Path

folder = Path(os.environ["SLOW_PYTHON"])
if "SLURM_PROCID" in os.environ and (folder / "hold").exists():
    (folder / "holding").touch()
    while (folder / "hold").exists():
        time.sleep(0.005)
