"""Generation on two processes (gloo) gives the tokens of one; sharded, tensor-parallel, both.

Tests marked with `on_ranks` run on each rank; what one process gives is in their fixtures. test_generate_recipe.py has
the command.
"""

import functools
import random
import time
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from helpers import speculation
from helpers.commands import last_line
from helpers.compiled import compiled_steps
from helpers.configs import MODEL, generate_config, make_checkpoint
from helpers.ranks import on_ranks, run_on_ranks
from helpers.tiny import FAMILIES, SIZE, CountedCollectives, make_tiny
from omegaconf import OmegaConf
from torch.distributed.tensor import DTensor
from torchao.dtypes.nf4tensor import NF4Tensor
from torchtune import config
from torchtune.models.llama3 import base_llama_tp_plan
from torchtune.modules.peft import get_adapter_params

from layerskip_recipes import layerskip_decoder, processes
from layerskip_recipes.checkpoint.drafts import describe, read_description, write_draft
from layerskip_recipes.checkpoint.weights import load_decoder
from layerskip_recipes.cli.run import run_cli
from layerskip_recipes.config.loading import load_config
from layerskip_recipes.config.schema import check
from layerskip_recipes.generation import parallel
from layerskip_recipes.generation.api import generate
from layerskip_recipes.generation.config import GenerateConfig, Temperature
from layerskip_recipes.generation.drafting.chain import ChainDrafter
from layerskip_recipes.generation.drafting.draft_weights import draft_weights
from layerskip_recipes.generation.drafting.rule import DraftRule
from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.state import ModelState
from layerskip_recipes.model.draft import Draft, weights_hash

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

CPU = torch.device("cpu")
PROMPTS = [[1, 2, 3, 4, 5], [7, 8, 9]]
L, E, NEW = 6, 2, 8
SPECULATIVE = {"exit_layer": E, "num_speculations": 3}
MODES = {
    "speculative": SPECULATIVE,
    "plain": {},
    "early": {"exit_layer": E},
    "sampled": SPECULATIVE | {"temperature": 1.0, "seed": 1},
}
# What ranks could choose differently, or see differently, without rank 0's word.
CHOICES = {
    "chain": {},
    "look-up": {"prompt_lookup": 1},
    "vocabulary": {"draft_vocabulary": list(range(0, 90, 2))},
    "penalty": {"repetition_penalty": 1.3},
    "chain, sampled": {"temperature": 1.0},
    "look-up, sampled": {"prompt_lookup": 1, "temperature": 1.0},
}
# How the late layers are split: kept_layers, and how many ranks share a matrix.
SPLITS = {"draft_whole": (E, 1), "all_sharded": (0, 1), "nothing_sharded": (L, 1), "tensor_parallel": (E, 2)}
# qwen2 has biases and a tied head, which are sharded and split by tensor parallelism.
CASES = [("llama3", how) for how in SPLITS] + [("qwen2_tied", "draft_whole"), ("qwen2_tied", "tensor_parallel")]


def run(model, prompts=PROMPTS, new=NEW, **settings):
    return generate(model, prompts, new, **settings)


@functools.cache
def model_of(family):
    return layerskip_decoder(make_tiny(family))


def split(family, how):
    """A tiny model over all ranks, whose weights rank 0 alone has."""
    state = make_tiny(family).state_dict() if processes.is_rank_zero() else {}
    with torch.device("meta"):
        model = layerskip_decoder(FAMILIES[family]())
    kept, dim = SPLITS[how]
    return parallel.shard_decoder(model, state, CPU, torch.float32, kept, dim, base_llama_tp_plan())


def full_weights(model):
    return {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in model.state_dict().items()}


def tokens_by_mode(model):
    return {mode: run(model, **settings).tokens.tolist() for mode, settings in MODES.items()}


# ---- tokens and logits ----


@pytest.fixture
def alone(family):
    """Tokens and logits of one process."""
    return tokens_by_mode(model_of(family)), model_of(family)(torch.tensor(PROMPTS[:1]))


@pytest.mark.parametrize(("family", "how"), CASES)
@on_ranks()
def test_tokens_and_logits_are_those_of_one_process(family, how, alone):
    """Logits also of a forward pass in two parts, and of layers that are called directly."""
    expected, logits = alone
    model, tokens = split(family, how), torch.tensor(PROMPTS[:1])
    assert tokens_by_mode(model) == expected and expected["speculative"] == expected["plain"]
    # Tensor parallelism adds up the parts of a sum in another order.
    tolerance = {"atol": 1e-3 if how == "tensor_parallel" else 0, "rtol": 0}
    with torch.no_grad():
        half = model(tokens, exit_layer=4, unembed=False)
        direct = model.tok_embeddings(tokens)
        for layer in model.layers:
            direct = layer(direct)
        for found in (model(tokens), model(hidden=half, start_layer=4), model.unembed(direct)):
            torch.testing.assert_close(found, logits, **tolerance)


# Where both ranks share each matrix: a vocabulary of which each has half.
EVEN = {"vocab_size": 98, "num_layers": 3}
LOOKED_UP = SPECULATIVE | {"prompt_lookup": 1}
# With biases and a tied head two rows, eager; with a head of its own one, compiled.
LOCAL = {
    "qwen2_tied": (PROMPTS, [SPECULATIVE, LOOKED_UP], False),
    "llama3": (PROMPTS[0], [SPECULATIVE], True),
}


@pytest.fixture
def even_tokens(family, monkeypatch):
    for name, value in EVEN.items():
        monkeypatch.setitem(SIZE, name, value)
    prompts, modes, _ = LOCAL[family]
    return [run(layerskip_decoder(make_tiny(family)), prompts, **settings).tokens.tolist() for settings in modes]


@pytest.mark.parametrize("family", LOCAL)
@on_ranks()
def test_a_rank_decodes_with_its_parts_of_matrices_as_plain_tensors(family, even_tokens, traced):
    """By drafts and look-ups, also by graphs; nothing of torch's own tensor parallelism is left."""
    prompts, modes, compiled = LOCAL[family]
    model = split(family, "tensor_parallel")
    assert not [name for name, p in model.named_parameters() if isinstance(p, DTensor)]
    shapes = [*model.tok_embeddings.weight.shape, *model.layers[1].mlp.w2.weight.shape]
    assert shapes == [49, SIZE["embed_dim"], SIZE["embed_dim"], SIZE["intermediate_dim"] / 2]
    for settings, expected in zip(modes, even_tokens, strict=True):
        assert run(model, prompts, **settings, compile=compiled).tokens.tolist() == expected
    steps = compiled_steps(model)
    assert bool(steps.graphs) == compiled and not steps.failed and not steps.refused


# 33 on each of two tensor-parallel ranks, which cannot be halved again.
UNEVEN = {"intermediate_dim": 66, "num_layers": 3}


@pytest.fixture
def uneven_tokens(monkeypatch):
    for name, value in UNEVEN.items():
        monkeypatch.setitem(SIZE, name, value)
    return run(layerskip_decoder(make_tiny("qwen2_tied")), new=4).tokens.tolist()


@on_ranks(4)
def test_a_grid_of_shards_and_tensor_parallel_ranks_decodes(uneven_tokens):
    """On 2 x 2 ranks."""
    model, weights = split("qwen2_tied", "tensor_parallel"), make_tiny("qwen2_tied").state_dict()
    full = full_weights(model)
    # Few shapes of tensors, for each of which torch takes a while to find how it is split.
    assert run(model, new=4, exit_layer=E, num_speculations=1).tokens.tolist() == uneven_tokens
    assert all(torch.equal(full[name], value) for name, value in weights.items())
    matrix = "layers.2.mlp.w1.weight"
    assert model.get_parameter(matrix).to_local().shape[0] == (17 if dist.get_rank() < 2 else 16)
    assert full[matrix].shape[0] == 66


# ---- what ranks decide together ----


def chosen_tokens(model):
    return {
        mode: run(model, new=10, **SPECULATIVE | {"seed": 1} | settings).tokens.tolist()
        for mode, settings in CHOICES.items()
    }


@pytest.fixture
def chosen_alone():
    return chosen_tokens(model_of("llama3"))


@on_ranks()
def test_ranks_choose_alike_whatever_their_clocks_say(chosen_alone, monkeypatch):
    """Each measures times of its own, by which drafts may give way to plain decoding."""
    draw, clock = random.Random(dist.get_rank()), time.perf_counter
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + draw.random())
    assert chosen_tokens(split("llama3", "draft_whole")) == chosen_alone


@pytest.fixture
def seed_0():
    return run(model_of("llama3"), **SPECULATIVE, temperature=1.0, seed=0).tokens.tolist()


@pytest.mark.parametrize("how", ["all_sharded", "draft_whole", "tensor_parallel"])
@on_ranks()
def test_ranks_with_seeds_of_their_own_draw_alike(how, seed_0):
    """By rank 0's seed: with tensor parallelism drafts that differ would be the sums of different tokens."""
    model = split("llama3", how)
    torch.manual_seed(dist.get_rank())  # as torchtune's set_seed without a seed leaves them
    draws = [run(model, **SPECULATIVE, temperature=1.0, seed=seed) for seed in (None, dist.get_rank())]
    unseeded, seeded = (out.tokens.tolist() for out in draws)
    assert seeded == seed_0 and processes.same_on_all(unseeded)


@on_ranks()
def test_ranks_with_other_prompts_are_refused():
    with pytest.raises(ValueError, match="prompt: "):
        run(split("llama3", "draft_whole"), [[5 + dist.get_rank()]], **SPECULATIVE)


@on_ranks()
def test_each_rank_has_half_of_the_late_layers():
    model = split("qwen2_tied", "draft_whole")
    full = full_weights(model)
    local = {name: p.to_local() for name, p in model.named_parameters() if isinstance(p, DTensor)}
    halved = [name for name, p in local.items() if p.numel() == full[name].numel() / 2]
    assert halved == [n for n in full if n.startswith("layers.") and int(n.split(".")[1]) >= E]


@contextmanager
def gathers_before_drafts(counted):
    """A list of how many gathers had begun before each chain was drafted."""
    propose, counts = ChainDrafter.propose, []

    def watched(*args):
        counts.append(counted.counts["all_gather"])
        return propose(*args)

    with mock.patch.object(ChainDrafter, "propose", watched):
        yield counts


@on_ranks()
def test_a_round_gathers_each_late_layer_once_and_its_draft_nothing():
    """A verification gathers each late layer once, and so does the prompt; a draft gathers nothing. Rank 0 tells the
    others what came out. Once they compare their prompts: how long what they say is, and it. The first late layer is on
    its way while a draft is made."""
    compared, stats, counts = 2, [], []
    for how, settings in (("draft_whole", SPECULATIVE), ("all_sharded", {})):
        model = split("llama3", how)
        always = mock.patch.object(ModelState, "rule", lambda *_: DraftRule(measure=False))
        with always, CountedCollectives() as counted, gathers_before_drafts(counted) as before_drafts:
            stats.append(run(model, PROMPTS[0], **settings).stats)
        counts.append(counted.counts)
        if settings:
            rounds = stats[0].rounds
            assert before_drafts == [compared + (1 + i) * (L - E) + 1 for i in range(rounds)]
    assert counts[0] == {"all_gather": (1 + rounds) * (L - E) + compared, "broadcast": 1 + rounds}
    assert counts[1] == {"all_gather": NEW * L + compared, "broadcast": NEW}
    assert [s.tokens for s in stats] == [NEW, NEW] and counts[0]["all_gather"] < counts[1]["all_gather"]


# ---- loading ----


def trained_speculation(folder):
    draft = read_description(folder, "draft")
    return Speculation(draft.exit_layer, 3, draft.vocabulary, draft=draft)


@pytest.fixture
def trained(kind, tmp_path, tokenizer_folder):
    """A config with a trained draft, and the generation of one process with it."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", tokenizer_folder)
    model = load_decoder(GenerateConfig.load(load_config(str(generate_config(tmp_path, checkpoint)))), CPU)
    torch.manual_seed(0)
    draft = Draft(model, kind, 2)
    for parameter in draft.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    draft.vocabulary = list(range(0, 300, 2))
    folder, base = tmp_path / "draft", {"folder": str(checkpoint), "hash": weights_hash(model.state_dict())}
    write_draft(folder, draft.state_dict(), describe(draft, base, 1))
    alone = speculation.run(model, PROMPTS, NEW, speculation=trained_speculation(str(folder)))
    assert alone.generated == speculation.run(model, PROMPTS, NEW).generated and alone.stats.drafted > 0
    settings = {"draft": str(folder), "num_speculations": 3}
    return generate_config(tmp_path, checkpoint, self_speculation=settings), alone


@pytest.mark.parametrize("kind", ["copy", "adapter"])
@on_ranks()
def test_each_rank_has_all_of_a_trained_draft(kind, trained):
    """A copy needs none of the model's layers, an adapter its first two. Tokens and counts are those of one process."""
    path, alone = trained
    cfg = GenerateConfig.load(load_config(str(path)))
    plan = trained_speculation(cfg.self_speculation.draft)
    model, draft = parallel.load_sharded_decoder(cfg, CPU, plan.model_layers, draft=plan.draft)
    ours = speculation.run(model, PROMPTS, NEW, speculation=plan, draft_weights=draft_weights(plan, model, draft))
    assert ours.generated == alone.generated
    assert (ours.stats.drafted, ours.stats.accepted) == (alone.stats.drafted, alone.stats.accepted)


LORA = {"lora_attn_modules": ["q_proj", "v_proj"], "apply_lora_to_mlp": True, "lora_rank": 4, "lora_alpha": 8}
ADAPTED = {
    "dora": {"use_dora": True},
    "qlora": {"quantize_base": True, "num_layers": 2, "num_kv_heads": 2, "embed_dim": 256, "intermediate_dim": 256},
}


def randomise(model):
    for name, parameter in model.named_parameters():
        if name.endswith("magnitude"):
            torch.nn.init.uniform_(parameter, 1, 2)
        elif parameter.dim() > 1 and not isinstance(parameter, NF4Tensor):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def loaded(adapters, tmp_path, tokenizer_folder):
    """A config of weights with adapters or without, and the model that one process reads."""
    if adapters is None:
        path = generate_config(tmp_path, make_checkpoint(tmp_path / "checkpoint", tokenizer_folder))
    else:
        changes = ADAPTED[adapters]
        plain = MODEL | {name: value for name, value in changes.items() if name in MODEL}
        builder = f"{MODEL['_component_'].rpartition('.')[0]}.lora_llama3_2"
        section = plain | changes | LORA | {"_component_": builder}
        torch.manual_seed(0)
        adapted, base = (randomise(config.instantiate(OmegaConf.create(part))) for part in (section, plain))
        torch.save(get_adapter_params(adapted), tmp_path / "adapter_model.pt")
        torch.save(base.state_dict(), tmp_path / "model.pt")
        reader = {
            "_component_": "torchtune.training.FullModelTorchTuneCheckpointer", "checkpoint_dir": str(tmp_path),
            "checkpoint_files": ["model.pt"], "adapter_checkpoint": str(tmp_path / "adapter_model.pt"),
            "output_dir": str(tmp_path), "model_type": "LLAMA3_2",
        }  # fmt: skip
        path = generate_config(tmp_path, tokenizer_folder, model=section, checkpointer=reader)
    cfg = GenerateConfig.load(load_config(str(path), ["dtype=bf16"]))
    return cfg, load_decoder(cfg, CPU)


@pytest.mark.parametrize("adapters", [None, *ADAPTED])
@on_ranks()
def test_only_rank_zero_reads_the_checkpoint_and_adapters_are_merged_as_in_one_process(adapters, loaded, monkeypatch):
    """In bf16 from fp32 files; QLoRA's adapters onto what NF4 left of the weights."""
    if dist.get_rank() == 1:
        monkeypatch.setattr(parallel, "read_weights", None)  # not to be called
    cfg, whole = loaded
    model, _ = parallel.load_sharded_decoder(cfg, CPU, kept_layers=1)
    weights, expected, buffers = full_weights(model), whole.state_dict(), dict(model.named_buffers())
    assert weights.keys() == expected.keys() and not model.training
    assert all(torch.equal(weights[n], p) and weights[n].dtype == torch.bfloat16 for n, p in expected.items())
    assert buffers and all(torch.equal(buffers[n], b) for n, b in whole.named_buffers())
    settings = {"exit_layer": 1, "num_speculations": 3}
    assert run(model, **settings).tokens.tolist() == run(whole, **settings).tokens.tolist()


def mistake_of_rank_one():
    """While rank 0 waits for it."""
    if dist.get_rank() == 1:
        check("temperature", -1, Temperature)
    processes.broadcast_from_rank0(torch.zeros(1))


def checkpoint_of_another_model():
    """Which rank 0 alone sees."""
    cfg = GenerateConfig.load(load_config("generate.yaml", ["model.num_layers=3"]))
    parallel.load_sharded_decoder(cfg, CPU)


@pytest.mark.parametrize(
    ("fail", "rank", "message"),
    [(mistake_of_rank_one, 1, "temperature: -1 "), (checkpoint_of_another_model, 0, "checkpointer: ")],
)
def test_an_error_of_a_rank_ends_the_other_one(fail, rank, message, tmp_path, checkpoint):
    """Which waits for it, or for the checkpoint, and has nothing to say. test_cli.py has a mistake under torchrun."""
    generate_config(tmp_path, checkpoint)

    def command():
        processes.init_processes("cpu")
        fail()

    ranks = run_on_ranks(lambda: run_cli(command), tmp_path)
    assert [done.returncode for done in ranks] == [1, 1]
    assert last_line(ranks[rank].stderr).startswith(f"ValueError: {message}")
    assert "ValueError" not in ranks[1 - rank].stderr
