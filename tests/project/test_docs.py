"""The pages of the documentation: links, Python examples, the made reference of keys, and the names of files."""

import doctest
import re
import runpy

import pytest
import yaml
from helpers.configs import make_checkpoint
from helpers.json_lines import change_json
from helpers.pages import PAGES, ROOT, anchors, blocks

from layerskip_recipes.cli.configs import RECIPES, config_class
from layerskip_recipes.config.json_schema import json_schema
from layerskip_recipes.config.names import our_configs
from layerskip_recipes.generation import api
from layerskip_recipes.model import decoder

TOOL = runpy.run_path(str(ROOT / "tools" / "configuration_reference.py"))

OTHER_PAGES = {name: ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md")}


@pytest.mark.parametrize("page", [*PAGES, *OTHER_PAGES])
def test_links_lead_somewhere(page):
    path = (PAGES | OTHER_PAGES)[page]
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(#[^)]*)?\)", path.read_text(encoding="utf-8")):
        linked = (path.parent / target).resolve() if target else path
        assert linked.exists(), f"{page}: {target}"
        name = linked.relative_to(ROOT).as_posix()
        assert not anchor or anchor[1:] in anchors(name), f"{page}: {target}{anchor}"


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python") and "elsewhere" not in page])
def test_python_examples_of_pages_run(page, tokenizer_folder, tmp_path, monkeypatch):
    """For TRL's see test_finetuned_elsewhere.py."""
    folder = make_checkpoint(tmp_path / "quickstart", tokenizer_folder)  # the README's first commands make it
    (folder / "layerskip.json").write_text('{"exits": [2]}')
    change_json(folder / "config.json", max_position_embeddings=512)
    monkeypatch.chdir(tmp_path)
    for example in blocks(page, "python"):
        exec(compile(example, page, "exec"), {})


@pytest.mark.parametrize("module", [api, decoder], ids=lambda module: module.__name__)
def test_examples_in_docstrings_are_right(module):
    result = doctest.testmod(module)
    assert result.attempted >= 2 and result.failed == 0


def test_the_reference_of_keys_is_what_the_tool_makes():
    """After a change of a config class: `python tools/configuration_reference.py`."""
    assert PAGES["docs/configuration.md"].read_text(encoding="utf-8") == TOOL["page"]()


@pytest.mark.parametrize("recipe", RECIPES)
def test_our_configs_fit_the_json_schema_of_their_recipe(recipe):
    jsonschema = pytest.importorskip("jsonschema")
    schema = jsonschema.Draft202012Validator(json_schema(config_class(recipe)))
    texts = {name: path.read_text(encoding="utf-8") for name, path in our_configs().items()}
    of_recipe = [name for name, text in texts.items() if re.search(rf"^# .*tune run .*\b{recipe}\b", text, flags=re.M)]
    assert of_recipe
    for name in of_recipe:
        mistakes = [(list(e.path), e.message) for e in schema.iter_errors(yaml.safe_load(texts[name]))]
        assert not mistakes, name


@pytest.mark.parametrize(
    ("content", "fits"),
    [
        ({"extends": ["a", "b"], "draft": None, "early_exit_loss": {"interval": "${mine}"}, "mine": 3}, True),
        ({"batch_size": 0}, False),
        ({"layer_dropout": {"prb": 0.1}}, False),
        ({"layer_dropuot": {"prob": 0.1}}, False),
        ({"early_exit_loss": {"curriculum": "quick"}}, False),
    ],
)
def test_the_json_schema_refuses_mistakes(content, fits):
    jsonschema = pytest.importorskip("jsonschema")
    assert jsonschema.Draft202012Validator(json_schema(config_class("layerskip_finetune"))).is_valid(content) is fits


def test_the_readme_is_a_front_door():
    assert len(PAGES["README.md"].read_text(encoding="utf-8").splitlines()) <= 200


def test_each_folder_is_in_the_page_about_development():
    text = PAGES["docs/development.md"].read_text(encoding="utf-8")
    (tree,) = re.findall(r"## Layout.*?```\n(.*?)```", text, flags=re.S)
    named = set(re.findall(r"^ {2,4}(\w+)/ ", tree, flags=re.M))
    package = ROOT / "layerskip_recipes"
    rooms = {path.parent.name for path in package.glob("*/**/__init__.py")}
    assert named == rooms | {"custom_generate"}  # a file that is copied, and no module


def test_ci_finds_the_test_command():
    """`.ci/run` takes the line of python3 after this marker."""
    section = PAGES["README.md"].read_text(encoding="utf-8").partition("<!-- tests -->")[2]
    (line,) = [line for line in section.splitlines() if line.startswith("python3 ")]
    assert "-m pytest -n auto --dist loadfile --no-loadscope-reorder" in line
