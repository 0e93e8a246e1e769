"""The environment that ``ray.data.llm`` needs for images: an older vLLM, in a venv of its own.

Its image stage imports names that vLLM has dropped since. Made once, on demand, with the index
settings that ``cluster/install.py`` uses, and mended by the same ``cluster.repair``.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from cluster.install import TORCH_CPU_INDEX, index_answers
from cluster.repair import RepairError, SubprocessProber, VenvMender, repair
from jobs.bench.ray_llm_tuning import OLD_VLLM
from jobs.bench.single_tile import ENTRY_POINT, GROUP
from pipeline.errors import PipelineError

log = logging.getLogger(__name__)

_READY = "ready"
_PLUGIN = "maverick_batch_bench"


class VenvError(PipelineError):
    """The environment could not be made; the message says where pip's words are."""


def ensure(folder: Path) -> Path:
    """The environment's Python, made now if it is not there yet (some minutes).

    Raises:
        VenvError: pip or the repair failed.
    """
    python = folder / "bin" / "python"
    if (folder / _READY).exists():
        return python
    log.info("making %s with %s: some minutes, once", folder, OLD_VLLM)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    words = folder / "pip.log"
    command = [str(python), "-m", "pip", "install", "--progress-bar", "off"]
    command += [OLD_VLLM, f"ray[data]=={version('ray')}", "pillow", "pyarrow"]
    if index_answers(TORCH_CPU_INDEX):
        command += ["--extra-index-url", TORCH_CPU_INDEX]
    with words.open("w", encoding="utf-8") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False)
    if code.returncode != 0:
        raise VenvError(f"{OLD_VLLM} could not be installed; pip's words: {words}")
    try:
        repair(SubprocessProber(python), VenvMender(python), log.info)
    except RepairError as error:
        raise VenvError(str(error)) from error
    _add_plugin(python)
    (folder / _READY).touch()
    return python


def _add_plugin(python: Path) -> None:
    """An entry point without a package: its module comes from this project, by ``PYTHONPATH``."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    folder = Path(done.stdout.strip()) / f"{_PLUGIN}-1.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {_PLUGIN}\nVersion: 1\n")
    (folder / "entry_points.txt").write_text(f"[{GROUP}]\n{ENTRY_POINT}\n")
