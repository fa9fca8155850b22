"""How long ``latentwire status`` takes, as a user sees it: one line of seconds."""

import subprocess
import sys
import time

started = time.perf_counter()
subprocess.run([sys.executable, "-m", "latentwire", "status"], stdout=subprocess.DEVNULL, check=True)
print(f"{time.perf_counter() - started:.3f} s")
