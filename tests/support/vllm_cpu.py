"""vLLM's own server, its CPU build, in a virtual environment of its own (`make .venv-vllm/.installed`)."""

import atexit
import os
import subprocess
from pathlib import Path

from support.paths import ROOT
from support.ports import held

PYTHON = os.environ.get("KIBITZ_VLLM_PYTHON", str(ROOT / ".venv-vllm" / "bin" / "python"))
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
MISSING = "vllm-cpu is not installed: make .venv-vllm/.installed"


def installed() -> bool:
    asked = [PYTHON, "-c", "import importlib.metadata as m; m.version('vllm-cpu')"]
    return Path(PYTHON).exists() and subprocess.run(asked, capture_output=True, check=False).returncode == 0


def free_port() -> int:
    """A port that the system gives to nobody meanwhile, of which a server that starts takes seconds to listen at."""
    holder = held()
    atexit.register(holder.close)
    return holder.getsockname()[1]
