"""Generation on two processes (gloo) gives the tokens of one; sharded, tensor-parallel, both.

The processes are forks with the environment that torchrun gives, since it imports everything once more for each rank;
test_generate_recipe.py has a real `tune run`.
"""

import json

import pytest
import torch
from helpers import generating_ranks, speculation
from helpers.commands import last_line
from helpers.configs import MODEL, generate_config, make_checkpoint
from helpers.generating_ranks import (
    ADAPTED,
    CASES,
    EVEN,
    LOCAL,
    LOCAL_MODES,
    MODES,
    NEW,
    OTHER_MODES,
    PROMPTS,
    SHARED_MODEL,
    UNEVEN,
    E,
    L,
    everything,
    other,
    run,
    trained_speculation,
)
from helpers.ranks import check_success, run_on_ranks
from helpers.tiny import SIZE, make_tiny
from omegaconf import OmegaConf
from torchao.dtypes.nf4tensor import NF4Tensor
from torchtune import config
from torchtune.modules.peft import get_adapter_params

from layerskip_recipes import layerskip_decoder, processes
from layerskip_recipes.checkpoint.drafts import describe, write_draft
from layerskip_recipes.checkpoint.weights import load_decoder
from layerskip_recipes.config.loading import load_config
from layerskip_recipes.generation.config import GenerateConfig
from layerskip_recipes.model.draft import Draft, weights_hash

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def written(folder):
    """What each rank wrote."""
    return [json.loads(file.read_text()) for file in sorted(folder.glob("rank*.json"))]


def fork(what, folder, processes=2):
    """Run a function of RANKS on so many forks; returns them, finished."""
    return run_on_ranks(generating_ranks.__file__, what, folder, cwd=folder, processes=processes)


@pytest.fixture(scope="module")
def decoded(tmp_path_factory):
    """What both ranks of decode_rank have."""
    folder = tmp_path_factory.mktemp("decode")
    check_success(fork("decode", folder))
    ranks = written(folder)
    assert len(ranks) == 2
    return ranks


@pytest.mark.parametrize(("family", "how"), CASES)
def test_the_tokens_and_walks_of_one_process(decoded, family, how):
    expected, (whole, *_) = everything(layerskip_decoder(make_tiny(family)))
    for rank in decoded:
        tokens, walks = rank[f"{family}/{how}"]
        assert tokens == expected and tokens["speculative"] == tokens["autoregressive"]
        for logits in walks:
            # Tensor parallelism adds up the parts of a sum in another order.
            tolerance = 1e-3 if how == "tensor_parallel" else 0
            torch.testing.assert_close(torch.tensor(logits), torch.tensor(whole), atol=tolerance, rtol=0)


def test_parts_of_matrices_as_plain_tensors(tmp_path, monkeypatch):
    """By drafts and look-ups; nothing of torch's own tensor parallelism is left."""
    check_success(fork("local", tmp_path))
    for name, value in EVEN.items():
        monkeypatch.setitem(SIZE, name, value)
    for rank in written(tmp_path):
        for family, (prompts, modes, compiled) in LOCAL.items():
            alone = layerskip_decoder(make_tiny(family))
            assert rank[f"{family}/torch's"] == []
            assert rank[f"{family}/halves"] == [49, SIZE["embed_dim"], SIZE["embed_dim"], SIZE["intermediate_dim"] / 2]
            for mode in modes:
                assert rank[f"{family}/{mode}"] == run(alone, prompts, **LOCAL_MODES[mode]).tokens.tolist()
            graphs, failed, refused = rank[f"{family}/graphs"]
            assert (graphs > 0) == compiled and not failed and refused == 0


@pytest.mark.parametrize("mode", OTHER_MODES)
def test_ranks_choose_alike_whatever_their_clocks_say(decoded, mode):
    expected = other(layerskip_decoder(make_tiny("llama3")), mode)
    assert decoded[0][f"other/{mode}"] == decoded[1][f"other/{mode}"] == expected


@pytest.mark.parametrize("how", SHARED_MODEL)
def test_ranks_with_seeds_of_their_own_draw_alike(decoded, how):
    """By rank 0's seed: with tensor parallelism drafts that differ would be the sums of different tokens."""
    expected = run(layerskip_decoder(make_tiny("llama3")), **MODES["speculative"], temperature=1.0, seed=0)
    ours, theirs = (rank[f"own seeds/{how}"] for rank in decoded)
    assert ours == theirs and ours[1] == expected.tokens.tolist()


@pytest.mark.parametrize("family", ["llama3", "qwen2_tied"])
def test_each_rank_has_half_of_the_late_layers(decoded, family):
    names = [name for name, _ in make_tiny(family).named_parameters()]
    late = [name for name in names if name.startswith("layers.") and int(name.split(".")[1]) >= E]
    assert len(late) == len([n for n in names if n.startswith("layers.")]) * (L - E) / L
    assert all(rank[f"{family}/halved"] == late for rank in decoded)


def test_collectives_per_token(decoded):
    """A verification gathers each late layer once, and so does the prompt; a draft gathers nothing. Rank 0 tells the
    others what came out. Once they compare their prompts: how long what they say is, and it. The first late layer is on
    its way while a draft is made."""
    compared = 2
    for rank in decoded:
        counts, rounds, tokens, before_drafts = rank["count/speculative"]
        plain, _, plain_tokens, _ = rank["count/autoregressive"]
        assert before_drafts == [compared + (1 + i) * (L - E) + 1 for i in range(rounds)]
        assert counts == {"all_gather": (1 + rounds) * (L - E) + compared, "broadcast": 1 + rounds}
        assert plain == {"all_gather": plain_tokens * L + compared, "broadcast": plain_tokens}
        assert tokens == plain_tokens == NEW
        assert counts["all_gather"] / tokens < plain["all_gather"] / plain_tokens


def test_ranks_with_other_prompts_are_refused_and_one_process_tells_nobody(decoded):
    assert all(rank["other prompts"].startswith("prompt: differs between ranks") for rank in decoded)
    alone = torch.tensor([5, 1])
    assert processes.broadcast_from_rank0(alone) is alone


def randomise(model):
    for name, parameter in model.named_parameters():
        if name.endswith("magnitude"):
            torch.nn.init.uniform_(parameter, 1, 2)
        elif parameter.dim() > 1 and not isinstance(parameter, NF4Tensor):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def config_folder(tmp_path_factory, tokenizer_folder):
    """A folder with a checkpoint and generate.yaml, and a config for each kind of adapters."""
    folder = tmp_path_factory.mktemp("load")
    builders = MODEL["_component_"].rpartition(".")[0]
    lora = {"lora_attn_modules": ["q_proj", "v_proj"], "apply_lora_to_mlp": True, "lora_rank": 4, "lora_alpha": 8}
    torch.manual_seed(0)
    for kind, changes in ADAPTED.items():
        plain = MODEL | {name: value for name, value in changes.items() if name in MODEL}
        section = plain | changes | lora | {"_component_": f"{builders}.lora_llama3_2"}
        adapted, base = (randomise(config.instantiate(OmegaConf.create(part))) for part in (section, plain))
        (files := folder / kind).mkdir()
        torch.save(get_adapter_params(adapted), files / "adapter_model.pt")
        torch.save(base.state_dict(), files / "model.pt")
        reader = {
            "_component_": "torchtune.training.FullModelTorchTuneCheckpointer", "checkpoint_dir": str(files),
            "checkpoint_files": ["model.pt"], "adapter_checkpoint": str(files / "adapter_model.pt"),
            "output_dir": str(files), "model_type": "LLAMA3_2",
        }  # fmt: skip
        generate_config(files, tokenizer_folder, model=section, checkpointer=reader).rename(folder / f"{kind}.yaml")
    generate_config(folder, make_checkpoint(folder / "checkpoint", tokenizer_folder))
    return folder


def test_each_rank_has_all_of_a_trained_draft(tmp_path, tokenizer_folder, monkeypatch):
    """A copy needs none of the model's layers, an adapter its first two. Tokens and counts are those of one process."""
    checkpoint, expected = make_checkpoint(tmp_path / "checkpoint", tokenizer_folder), {}
    for kind in ("copy", "adapter"):
        path = generate_config(tmp_path / kind, checkpoint).rename(tmp_path / f"{kind}.yaml")
        model = load_decoder(GenerateConfig.load(load_config(str(path))), torch.device("cpu"))
        torch.manual_seed(0)
        draft = Draft(model, kind, 2)
        for parameter in draft.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
        draft.vocabulary = list(range(0, 300, 2))
        folder, base = tmp_path / f"{kind}_draft", {"folder": str(checkpoint), "hash": weights_hash(model.state_dict())}
        write_draft(folder, draft.state_dict(), describe(draft, base, 1))
        settings = {"draft": str(folder), "num_speculations": 3}
        generate_config(tmp_path / kind, checkpoint, self_speculation=settings).rename(path)
        alone = speculation.run(model, PROMPTS, NEW, speculation=trained_speculation(str(folder)))
        assert alone.generated == speculation.run(model, PROMPTS, NEW).generated and alone.stats.drafted > 0
        expected[kind] = [alone.generated, alone.stats.drafted, alone.stats.accepted]
    check_success(fork("trained", tmp_path))
    assert written(tmp_path) == [expected] * 2


def test_only_rank_zero_reads_the_checkpoint_and_adapters_are_merged_as_in_one_process(config_folder):
    """QLoRA's onto what NF4 left of the weights."""
    check_success(fork("load", config_folder))
    expected = {"weights": True, "buffers": True, "training": False, "tokens": True}
    assert written(config_folder) == [dict.fromkeys(["generate", *ADAPTED], expected)] * 2


@pytest.mark.parametrize(
    ("what", "rank", "message"),
    [("fail", 1, "temperature: -1 "), ("fail_load", 0, "checkpointer: the checkpoint is not this")],
)
def test_an_error_of_a_rank_ends_the_other_one(what, rank, message, config_folder):
    """Which waits for it, or for the checkpoint, and has nothing to say. test_cli.py has a mistake under torchrun."""
    ranks = fork(what, config_folder)
    assert [done.returncode for done in ranks] == [1, 1]
    assert last_line(ranks[rank].stderr).startswith(f"ValueError: {message}")
    assert "ValueError" not in ranks[1 - rank].stderr


def test_a_grid_of_shards_and_tensor_parallel_ranks(tmp_path, monkeypatch):
    check_success(fork("grid", tmp_path, processes=4))
    ranks = written(tmp_path)
    assert len(ranks) == 4 and all(rank["weights"] for rank in ranks)
    assert [rank["halved"] for rank in ranks] == [[17, 66], [17, 66], [16, 66], [16, 66]]
    for name, value in UNEVEN.items():
        monkeypatch.setitem(SIZE, name, value)
    alone = layerskip_decoder(make_tiny("qwen2_tied"))
    expected = run(alone, new=4).tokens.tolist()
    assert all(rank["tokens"] == expected for rank in ranks)
