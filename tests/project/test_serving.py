"""What `layerskip export` writes, in llama.cpp: the same greedy tokens as in transformers, alone and as a draft model.

Needs llama-cpp-python (`pip install llama-cpp-python` builds it, 10 minutes or so on one core), and llama.cpp's
converter, which is in no wheel, but in its source distribution. benchmark/test_llama_cpp.py has llama.cpp's server.

    pip download --no-deps --no-binary :all: llama-cpp-python==0.3.36 && tar xzf llama_cpp_python-0.3.36.tar.gz
    export LLAMA_CPP_CONVERTER=$PWD/llama_cpp_python-0.3.36/vendor/llama.cpp/convert_hf_to_gguf.py
    pytest -m real tests/project/test_serving.py
"""

import os
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from helpers.configs import make_checkpoint
from helpers.smollm2 import smollm2_folder

from layerskip_recipes.checkpoint.export import export

transformers = pytest.importorskip("transformers")
CONVERTER = os.environ.get("LLAMA_CPP_CONVERTER")
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not CONVERTER, reason="LLAMA_CPP_CONVERTER is not set to llama.cpp's convert_hf_to_gguf.py"),
]
NEW = 32
NUM_DRAFT = 4
# The converter knows tokenizers by a hash of what they encode, and refuses any other. This names the regular expression
# of `ByteLevel(use_regex=True)`, which the quickstart's tokenizers have.
WITH_ANY_BYTE_LEVEL_TOKENIZER = """
import pathlib, runpy, sys
sys.argv = sys.argv[1:]
folder = pathlib.Path(sys.argv[0]).parent
sys.path[:0] = [str(folder), str(folder / "gguf-py")]
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Exported(NamedTuple):
    """The whole model and its draft: transformers' folders, GGUF files beside them, and what transformers generates."""

    folders: dict[str, Path]
    prompts: list[str]
    tokens: list[list[int]]  # the prompts
    greedy: dict[str, list[list[int]]]

    def gguf(self, name: str) -> str:
        return str(self.folders[name].with_suffix(".gguf"))


def convert(folder: Path, any_tokenizer: bool) -> None:
    script = ["-c", WITH_ANY_BYTE_LEVEL_TOKENIZER] if any_tokenizer else []
    command = [*script, str(CONVERTER), str(folder), "--outtype", "f32", "--outfile", str(folder.with_suffix(".gguf"))]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def greedy(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    """transformers' greedy tokens; no token ends the text."""
    model, outs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), []
    model.generation_config = transformers.GenerationConfig(do_sample=False, max_new_tokens=NEW, pad_token_id=0)
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        outs.append(model.generate(tokens, attention_mask=torch.ones_like(tokens))[0, len(prompt) :].tolist())
    return outs


@pytest.fixture(scope="module", params=["tiny", "smollm2"])
def exported(request, tmp_path_factory, tokenizer_folder) -> Exported:
    folder, tiny = tmp_path_factory.mktemp(request.param), request.param == "tiny"
    checkpoint = make_checkpoint(folder / "checkpoint", tokenizer_folder) if tiny else smollm2_folder()
    folders = {
        "whole": export(str(checkpoint), str(folder / "whole"), exit_layer=2),
        "draft": export(str(checkpoint), str(folder / "draft"), draft=2 if tiny else 6),
    }
    for exported_folder in folders.values():
        convert(exported_folder, any_tokenizer=tiny)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["whole"])
    prompts = ["def main(", "import os\n\n\nclass ", "it's 12345, isn't it? ", "    for i in range(10):\n        "]
    tokens = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    outs = {name: greedy(folders[name], tokens) for name in folders}
    return Exported(folders, prompts, tokens, outs)


@pytest.mark.parametrize("name", ["whole", "draft"])
def test_llama_cpp_generates_what_transformers_does(name, exported):
    model = llama(exported.gguf(name))
    for prompt, tokens, expected in zip(exported.prompts, exported.tokens, exported.greedy[name], strict=True):
        assert model.tokenize(prompt.encode()) == tokens
        assert list(islice(model.generate(tokens, temp=0.0), NEW)) == expected


def test_llama_cpp_drafts_with_the_draft(exported):
    """`draft_model=`: the same tokens, in fewer passes than tokens."""
    speculative = pytest.importorskip("llama_cpp.llama_speculative")
    draft, asked = llama(exported.gguf("draft")), []

    class Draft(speculative.LlamaDraftModel):
        def __call__(self, input_ids, /, **kwargs):
            asked.append(len(input_ids))
            tokens = islice(draft.generate(input_ids.tolist(), temp=0.0), NUM_DRAFT)
            return np.fromiter(tokens, dtype=np.intc)

    model = llama(exported.gguf("whole"), draft_model=Draft())
    for tokens, expected in zip(exported.tokens, exported.greedy["whole"], strict=True):
        assert list(islice(model.generate(tokens, temp=0.0), NEW)) == expected
    assert 0 < len(asked) < (NEW - 1) * len(exported.tokens)  # so many without an accepted draft


def llama(path: str, **settings):
    """In fp32 throughout: the cache is fp16 by default. One thread: more of them spin where a core is not theirs."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    fp32 = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32, "flash_attn": False}
    threads = {"n_threads": 1, "n_threads_batch": 1}
    return llama_cpp.Llama(path, n_ctx=128, verbose=False, **threads, **fp32, **settings)
