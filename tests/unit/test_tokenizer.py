"""The tokenizer is the one ``AutoTokenizer`` loads, and does not cost what loading it so costs."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.model import ModelSpec, load_prompt_format
from pipeline.profile import locate_model

MODEL = Path(locate_model("cluster/models/mini-maverick"))
TEXT = "Zwölf Boxkämpfer jagen Viktor. 十二 🥊<|eot|>\r\n\t12345 isn't"


@pytest.mark.parametrize(
    "named",
    ["TokenizersBackend", "PreTrainedTokenizerFast", "PreTrainedTokenizer", "GPT2Tokenizer", None],
)
def test_whatever_class_a_model_names_it_is_tokenized_as_auto_tokenizer_does(
    named: str | None, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "tokenizer_class": named}))
    ours = load_prompt_format(ModelSpec(str(folder), None, 4096)).tokenizer
    theirs = AutoTokenizer.from_pretrained(folder)
    assert type(ours) is type(theirs)
    assert ours(TEXT)["input_ids"] == theirs(TEXT)["input_ids"]
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.chat_template == theirs.chat_template
    assert ours.get_vocab() == theirs.get_vocab()


def test_a_process_that_prepares_rows_of_llama_4_does_without_torch() -> None:
    """It would take 0.4 GB and 6 CPU seconds more, in each such process of a cluster."""
    program = f"""
import sys
import pipeline.flow
from pipeline.model import ModelSpec, load_prompt_format
assert load_prompt_format(ModelSpec({str(MODEL)!r}, None, 4096)).tokenizer("a")["input_ids"]
sys.exit("torch" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
