"""The pages of the documentation: links, Python examples, the made reference of keys, and the names of files."""

import doctest
import fnmatch
import re
import runpy

import pytest
import yaml
from helpers.configs import make_checkpoint
from helpers.json_lines import change_json
from helpers.pages import PAGES, ROOT, blocks

from layerskip_recipes.cli.configs import RECIPES, config_class
from layerskip_recipes.config.json_schema import json_schema
from layerskip_recipes.config.names import our_configs, torchtune_configs
from layerskip_recipes.generation import api
from layerskip_recipes.model import decoder


def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", PAGES[page].read_text(encoding="utf-8"), flags=re.S | re.M)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


TOOL = runpy.run_path(str(ROOT / "tools" / "configuration_reference.py"))

SOURCES = ("layerskip_recipes", "recipes", "tests", "tools", "examples")
OTHER_PAGES = {name: ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md")}


@pytest.mark.parametrize("page", [*PAGES, *OTHER_PAGES])
def test_links_lead_somewhere(page):
    path = (PAGES | OTHER_PAGES)[page]
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(#[^)]*)?\)", path.read_text(encoding="utf-8")):
        linked = (path.parent / target).resolve() if target else path
        assert linked.exists(), f"{page}: {target}"
        name = linked.relative_to(ROOT).as_posix()
        assert not anchor or anchor[1:] in anchors(name), f"{page}: {target}{anchor}"


def cited(page: str) -> set[str]:
    """What stands between backticks on a page."""
    text = re.sub(r"^```.*?^```$", "", (PAGES | OTHER_PAGES)[page].read_text(encoding="utf-8"), flags=re.S | re.M)
    return {" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)}


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_cited_files_and_configs_exist(page):
    """A page may leave out the first folders of a file: `drafting/rule.py`. NAME stands for a name that is free."""
    files = [f"/{path.relative_to(ROOT).as_posix()}" for folder in SOURCES for path in (ROOT / folder).rglob("*.*")]
    configs = [*our_configs(), *torchtune_configs()]
    folders = {name.partition("/")[0] for name in our_configs()}
    for span in cited(page) - {"convert_hf_to_gguf.py"}:  # of llama.cpp
        if re.fullmatch(r"[\w./]+\.(py|cpp|sh)", span) and "NAME" not in span:
            assert any(file.endswith(f"/{span}") for file in files), span
        elif re.fullmatch(r"\w+/[\w.*]+", span) and span.partition("/")[0] in folders - {"qa", "quickstart"}:
            assert fnmatch.filter(configs, span), span
        elif re.fullmatch(r"(qa|quickstart)/\w+", span):  # also folders of runs
            assert span in configs or re.search(r"/(epoch_\d|benchmark)$", span), span


@pytest.mark.parametrize("page", ["docs/development.md"])
def test_cited_names_are_in_the_code(page):
    paths = [
        path for folder in SOURCES for path in (ROOT / folder).rglob("*.*") if path.suffix in (".py", ".cpp", ".yaml")
    ]
    words = {word for path in [*paths, ROOT / "pyproject.toml"] for word in re.findall(r"\w+", path.read_text())}
    names = {span for span in cited(page) if re.fullmatch(r"[A-Za-z_][\w.]*(\(\))?", span) and span != "vX.Y.Z"}
    assert {name: missing for name in names if (missing := set(re.findall(r"\w+", name)) - words)} == {}


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


def test_the_readme_is_one_page():
    assert len(PAGES["README.md"].read_text(encoding="utf-8").splitlines()) <= 150


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
