"""Every config that we carry: it validates, its model builds, its header starts it, its exits make sense; and for each
full and LoRA config of torchtune there is one of ours. Nothing is downloaded, no weight takes memory."""

import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import torchtune
import yaml
from omegaconf import DictConfig, OmegaConf
from torchtune._recipe_registry import get_all_recipes
from torchtune.modules import TransformerDecoder

from layerskip_recipes.cli.commands import validate
from layerskip_recipes.config import settings
from layerskip_recipes.config.loading import load_config
from layerskip_recipes.config.names import our_configs, torchtune_configs
from layerskip_recipes.config.settings import build_on_meta
from layerskip_recipes.model.decoder import LayerSkipDecoder, layerskip_decoder
from layerskip_recipes.model.layer_dropout import dropout_rates
from layerskip_recipes.training.early_exit import enabled_exits, exit_weights

# Families of which each size has its configs, and the words that mark a config of theirs as something else.
FAMILIES = (
    *("llama2", "code_llama2", "llama3", "llama3_1", "llama3_2", "llama3_3", "mistral"),
    *("qwen2", "qwen2_5", "gemma", "gemma2", "phi3", "phi4"),
)
LEFT_OUT = {
    "qlora": "quantised base weights",
    "dora": "another adapter, quantised or not",
    "qat": "quantisation-aware training",
    "dpo": "preferences",
    "ppo": "preferences",
    "KD": "distillation from a second model",
    "405B": "only as QLoRA",
    "evaluation": "no training",
    "generation": "no training",
}

# The paper's table: p_max, S(t), e_scale, curriculum, R, lr, batch per device, steps; None where it gives no value.
PAPER = {
    "llama2_7B_continual": (0.1, "constant", 0.2, "rotational", 8, 3e-5, 4, 50_000),
    "llama2_13B_continual": (0.1, "constant", 0.1, "rotational", 39, 2e-5, 4, 50_000),
    "llama3_8B_continual": (0.1, "constant", 0.1, "rotational", 8, None, None, None),
    "llama3_2_1B_continual": (0.1, "constant", 0.1, "rotational", 8, None, None, None),
    "llama2_1_5B_scratch": (0.1, "exp", 0.2, "rotational", 23, 8e-4, 4, 50_000),
    "llama2_7B_scratch": (0.2, "exp", 0.2, "rotational", 31, 8e-4, 4, 50_000),
    "llama_7B_code": (0.1, "constant", 1.0, "rotational", 16, 1e-4, 4, 10_000),
    "topv2_1_5B": (0.2, "constant", 1.0, "gradual", None, 1e-4, 32, 5_800),
}


# Exit and draft length of the authors' weights: the paper's for CNN/DM where its table has them, else their blog's and
# their code's.
RELEASED = {
    "llama2_7B": (8, 12),
    "llama2_13B": (15, 12),
    "llama2_70B": (10, 6),
    "codellama_7B": (4, 6),
    "codellama_34B": (8, 6),
    "llama3_8B": (4, 6),
    "llama3_2_1B": (4, 6),
}


def family_configs() -> list[str]:
    """Those of ours that extend a config of torchtune's by its name."""
    return [name for name in our_configs() if name.partition("/")[0] in FAMILIES and "generate" not in name]


def torchtunes() -> list[str]:
    """Every full and LoRA config in torchtune's folder that belongs to the families, without `LEFT_OUT`."""
    folder = Path(torchtune.__file__).parent.parent / "recipes" / "configs"
    names = [path.relative_to(folder).with_suffix("").as_posix() for path in folder.glob("*/*.yaml")]
    return sorted(n for n in names if n.partition("/")[0] in FAMILIES and not any(word in n for word in LEFT_OUT))


def is_distributed(name: str) -> bool:
    """Whether torchtune trains this config of its own on several devices."""
    (recipe,) = {r.name for r in get_all_recipes() for c in r.configs if c.name == name}
    return recipe.endswith("_distributed")


def header(name: str) -> str:
    """The comment at the top of a config, lines that a backslash continues joined."""
    lines = re.match(r"(?:#.*\n)*", our_configs()[name].read_text())[0]
    return re.sub(r"\\\n#\s*", "", lines)


@cache
def merged(name: str) -> DictConfig:
    return load_config(name)


@cache
def on_meta(name: str) -> TransformerDecoder:
    return build_on_meta(merged(name))


@pytest.fixture(scope="module", autouse=True)
def each_model_once():
    """The meta device's models, which many configs have alike."""
    build = settings.build

    @cache
    def built(section: str, key: str) -> TransformerDecoder:
        return build(OmegaConf.create(section), key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings, "build", lambda section, key: built(OmegaConf.to_yaml(section, resolve=True), key))
        yield


# By its header, so that a run of other tests need not merge them all; that it is right is tested below.
FINETUNE = [name for name in our_configs() if re.search("^#   tune run .*layerskip_finetune", header(name), flags=re.M)]


# ------------------------------------------------------------------------------------------------------- every config


@pytest.mark.parametrize("name", our_configs())
def test_it_validates_and_its_header_starts_that_recipe(name):
    recipe = validate(merged(name))
    commands = re.findall(r"^#   tune run (.*)$", header(name), flags=re.M)
    assert commands
    for command in commands:
        words = shlex.split(command)
        place = words.index("--config")
        assert words[place + 1] == name
        assert words[place - 1] == recipe
        if words[place + 2 :]:
            assert validate(load_config(name, words[place + 2 :])) == recipe


@pytest.mark.parametrize("name", our_configs())
def test_its_model_builds_on_the_meta_device(name):
    model = layerskip_decoder(on_meta(name))
    assert isinstance(model, LayerSkipDecoder)
    assert all(parameter.is_meta for parameter in model.parameters())


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("name", FINETUNE)
def test_the_exits_of_a_step(name):
    """The last layer is on at every step, with it 2 to 8 exits are, and within one rotation each exit has its turn."""
    section = merged(name).get("early_exit_loss")
    if section is None:
        assert name in ("related/layerdrop_llama2_7B", "related/pld_scratch")
        return
    section = OmegaConf.to_container(section)
    layers = len(on_meta(name).layers)
    given = {key: section[key] for key in ("interval", "layers") if key in section}
    turns, seen = section.get("interval", 8), set()
    for step in range(turns):
        on = enabled_exits(section["curriculum"], step, 2 * layers * turns, layers, **given)
        assert on[-1]
        assert exit_weights(layers, on, section["scale"], section.get("scale_fn", "layerskip"))[-1] > 0
        assert section["curriculum"] == "gradual" or 2 <= sum(on) <= 8
        seen |= {layer for layer in range(layers) if on[layer]}
    if section["curriculum"] == "rotational":
        assert seen == set(range(layers))


def test_the_gradual_curriculum_has_all_exits_on_from_the_middle():
    layers = len(on_meta("paper/topv2_1_5B").layers)
    assert sum(enabled_exits("gradual", 0, 5_800, layers)) == 1
    assert all(enabled_exits("gradual", 2_900, 5_800, layers))


def test_each_run_has_a_folder_of_its_own():
    folders = [OmegaConf.to_container(merged(name), resolve=True)["output_dir"] for name in FINETUNE]
    assert len(set(folders)) == len(folders)


def test_no_run_needs_bitsandbytes():
    assert [name for name in FINETUNE if merged(name).optimizer._component_.startswith("bitsandbytes")] == []


# ----------------------------------------------------------------------------------------------------------- families


def test_torchtunes_folder_has_what_we_look_for():
    """Otherwise the test below would pass on an empty list."""
    assert len(torchtunes()) >= 90
    assert {name.partition("/")[0] for name in torchtunes()} == set(FAMILIES)
    assert set(torchtunes()) <= set(torchtune_configs())


@pytest.mark.parametrize("name", torchtunes())
def test_each_of_torchtunes_has_one_of_ours(name):
    ours = f"{name}_layerskip"
    assert ours in our_configs()
    assert yaml.safe_load(our_configs()[ours].read_text())["extends"] == name
    assert bool(re.search(r"tune run .*--nproc_per_node \d+ ", header(ours))) == is_distributed(name)
    assert merged(ours).model._component_ == load_config(name).model._component_


@pytest.mark.parametrize("name", family_configs())
def test_each_of_ours_has_its_sections_and_one_of_torchtunes(name):
    assert name.removesuffix("_layerskip") in torchtunes()
    config = merged(name)
    assert config.layer_dropout.prob == 0.1 and config.early_exit_loss.curriculum == "rotational"
    assert config.early_exit_loss.scale in (0.1, 0.2) and config.early_exit_loss.interval < len(on_meta(name).layers)
    assert isinstance(config.seed, int)
    assert config.output_dir.startswith("/tmp/torchtune/") and "layerskip" in config.output_dir


# -------------------------------------------------------------------------------------------------------------- papers


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_values(name):
    prob, schedule, scale, curriculum, interval, lr, batch_size, steps = PAPER[name]
    config = merged(f"paper/{name}")
    dropout, loss = config.layer_dropout, config.early_exit_loss
    assert (dropout.prob, dropout.layers_scale, dropout.schedule) == (prob, "exp", schedule)
    assert (loss.scale, loss.curriculum, loss.get("interval")) == (scale, curriculum, interval)
    for given, expected in (
        (config.optimizer.lr, lr),
        (config.batch_size, batch_size),
        (config.epochs * config.max_steps_per_epoch, steps),
    ):
        assert expected is None or given == expected
    assert OmegaConf.to_container(config, resolve=True)["tokenizer"]["max_seq_len"] == 4096


@pytest.mark.parametrize("name", RELEASED)
def test_the_released_weights(name):
    """The exit and the draft length, a download line of that folder, and a tokenizer that the folder has."""
    config = load_config(f"facebook/layerskip_{name}")
    drafts = config.self_speculation
    assert (drafts.exit_layer, drafts.num_speculations) == RELEASED[name]
    (repository, folder) = re.search(
        r"^#   tune download (facebook/\S+) --output-dir (\S+) --hf-token <HF_TOKEN>$",
        our_configs()[f"facebook/layerskip_{name}"].read_text(),
        flags=re.M,
    ).groups()
    assert repository.replace("-", "").lower().endswith(name.replace("_", "").replace("32", "3.2").lower())
    assert config.checkpointer.checkpoint_dir == folder == f"/tmp/{repository.partition('/')[2]}"
    assert config.tokenizer.path == (folder if "llama3" in name else f"{folder}/tokenizer.model")


def test_the_released_weights_are_all_there():
    named = {f"facebook/layerskip_{name}" for name in RELEASED}
    assert named == {name for name in our_configs() if name.startswith("facebook/layerskip")}


def test_the_papers_configs_are_all_there():
    assert {f"paper/{name}" for name in PAPER} == {name for name in our_configs() if name.startswith("paper/")}


@pytest.mark.parametrize(("name", "billions"), [("llama2_1_5B_scratch", 1.5), ("llama2_7B_scratch", 6.74)])
def test_the_size_of_a_model_from_scratch(name, billions):
    weights = sum(parameter.numel() for parameter in on_meta(f"paper/{name}").parameters())
    assert weights / 1e9 == pytest.approx(billions, rel=0.02)


def test_related_methods():
    """LITE weighs its exits alike; LayerDrop drops all layers alike; PLD's rate grows linearly to a half."""
    lite = merged("related/lite_llama2_7B").early_exit_loss
    on = enabled_exits(lite.curriculum, 0, 1, 32, layers=lite.layers)
    assert [layer + 1 for layer in range(32) if on[layer]] == [8, 12, 16, 20, 24, 28, 32]
    weights = exit_weights(32, on, lite.scale, lite.scale_fn)
    assert weights[on].tolist() == pytest.approx([1 / 7] * 7)
    assert merged("related/lite_llama2_7B").get("layer_dropout") is None
    layerdrop = merged("related/layerdrop_llama2_7B").layer_dropout
    assert set(dropout_rates(32, layerdrop.prob, layerdrop.layers_scale)) == {0.2}
    pld = merged("related/pld_scratch").layer_dropout
    rates = dropout_rates(24, pld.prob, pld.layers_scale)
    assert rates == pytest.approx([0.5 * layer / 23 for layer in range(24)]) and pld.schedule == "progressive"
