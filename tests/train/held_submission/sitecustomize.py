"""Put on PYTHONPATH: a process that submits a run's job stands still while the run's directory says so.

Job number 1 is held by the file ``hold-submission-1``; ``submission-1.pid`` says that a process came to submit it.
"""

import os
import sys
import time
from pathlib import Path

if "latentwire.scheduler.submission" in sys.orig_argv:
    _token, path, number = sys.orig_argv[-3:]
    run = Path(path)
    hold = run / f"hold-submission-{number}"
    if hold.exists():
        aside = run / f".submission-{number}.{os.getpid()}"
        aside.write_text(str(os.getpid()))
        aside.rename(run / f"submission-{number}.pid")
        while hold.exists():
            time.sleep(0.005)
