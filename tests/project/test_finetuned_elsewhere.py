"""docs/finetuned_elsewhere.md with a tiny model: TRL trains it, then it gets a draft and answers with it."""

from pathlib import Path

import pytest
from helpers.hf_folders import model_with_tokenizer
from helpers.json_lines import write_lines
from helpers.pages import PAGES, blocks
from helpers.recipes import run_generate
from helpers.resuming import same_tensors
from helpers.training import note_good_draft, train

from layerskip_recipes import LLM

PAGE = "docs/finetuned_elsewhere.md"
TEMPLATE = """{% for m in messages %}<{{ m.role }}> {{ m.content }}{{ eos_token }}{% endfor %}\
{% if add_generation_prompt %}<assistant> {% endif %}"""
ON_THIS_MACHINE = '"my_model", max_steps=2, use_cpu=True'


def test_the_page_about_models_finetuned_elsewhere_is_short():
    assert len(PAGES[PAGE].read_text(encoding="utf-8").splitlines()) <= 60


@pytest.mark.slow
def test_what_trl_trains_gets_a_draft(tmp_path, tokenizer_folder, monkeypatch):
    pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    base = model_with_tokenizer("qwen3", tmp_path / "base", tokenizer_folder)
    (base / "chat_template.jinja").write_text(TEMPLATE)
    Path("my_data").mkdir()
    for name in ("train", "test"):
        write_lines(f"my_data/{name}.jsonl", ({"input": f"say {i}", "output": f"<{i}>"} for i in range(8)))
    (code,) = blocks(PAGE, "python")
    code = code.replace("Qwen/Qwen3-0.6B", str(base)).replace('"my_model"', ON_THIS_MACHINE)
    exec(compile(code, PAGE, "exec"), {})
    trained = LLM.load("my_model").model
    assert not same_tensors(trained.state_dict(), LLM.load("base").model.state_dict())

    train("qa/draft", "model_dir=my_model", "data_dir=my_data", "device=cpu")
    note_good_draft(Path("qa/epoch_0"))
    recipe, report = run_generate("qa/generate", "data_dir=my_data", "max_new_tokens=8", "device=cpu")
    assert same_tensors(trained.state_dict(), recipe.llm.model.state_dict())
    assert report["identical"] is True and report["drafted"] > 0
