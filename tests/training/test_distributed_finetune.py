"""Training on several processes (gloo) has the losses and weights of one, however the model is sharded; resume too.

The processes are forks with the environment that torchrun gives; test_generate_recipe.py has torchrun itself. Each run
happens once, when a test first asks for it.
"""

import functools

import pytest
import torch
from helpers.configs import HF_CONFIG, MODEL, SIZE, finetune_config, hf_sections, start_section
from helpers.hf_folders import make_hf_folder
from helpers.ranks import train_on_ranks
from helpers.resuming import COSINE, keep_only
from helpers.tiny import widen
from helpers.training import UNTIED, losses, texts, train
from safetensors.torch import load_file
from torchtune.models.llama3_2._component_builders import llama3_2

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

# 8 steps of 4 samples: as one process, as two with 2 samples each, or as four with 1; where nothing is resumed fewer.
STEPS = {"layer_dropout": None, "epochs": 2, "max_steps_per_epoch": 4, "clip_grad_norm": 1.0, "lr_scheduler": COSINE}
FEW = ["epochs=1", "max_steps_per_epoch=3"]
SAVES = ["save_every_n_steps=3", "enable_async_checkpointing=true"]  # shards there, and the whole after each epoch
PLAN = {"_component_": "torchtune.models.llama3.base_llama_tp_plan"}
UNSPLIT = {"tensor_parallel_plan": PLAN, "tensor_parallel_dim": 1}  # a plan for the cases that set another number
LORA = {
    "_component_": "torchtune.models.llama3_2._component_builders.lora_llama3_2",
    "lora_attn_modules": ["q_proj", "v_proj", "output_proj"],
    "apply_lora_to_mlp": True,
    "lora_rank": 4,
    "lora_alpha": 8,
    "use_dora": True,
    **SIZE,
}
# So large that each rank's half of a matrix is whole blocks of NF4.
QLORA = LORA | {"use_dora": False, "quantize_base": True, "num_layers": 2, "embed_dim": 256, "intermediate_dim": 256}
# Drafts: of a model that stays, and one that is trained with its model.
DRAFTS = {"copy": {"kind": "copy"}, "adapter": {"kind": "adapter", "vocabulary": 200, "finetune_model": True}}
# name: (config, processes, overrides)
CASES = {
    "FSDP": ("tied", 2, []),
    "embedding apart, fused, checkpointed": (
        "tied", 2, ["custom_sharded_layers=[tok_embeddings]", "optimizer.fused=true", "ac_mode=full", *FEW],
    ),
    "validated, gathered weights kept, accumulation, every second layer checkpointed, part of one apart": (
        "validated", 2, [
            "fsdp_reshard_after_forward=false", "batch_size=1", "gradient_accumulation_steps=2", "ac_mode=selective",
            "ac_option=2", "custom_sharded_layers=[layers.1.mlp]", *FEW,
        ],
    ),
    "optimizer in backward": ("in_backward", 2, []),
    "untied, both apart": ("untied", 2, ["custom_sharded_layers=[tok_embeddings,output]"]),
    "Gemma 2 by its folder": ("gemma2", 2, FEW),
    "DoRA with a copy": ("dora", 2, []),
    "QLoRA": ("qlora", 2, FEW),
    "TP, fused, checkpointed": (
        "untied", 2, ["tensor_parallel_dim=2", "batch_size=4", "optimizer.fused=true", "ac_mode=full", *FEW],
    ),
    "TP, validated, tied, dropout": ("dropped", 2, ["tensor_parallel_dim=2", "batch_size=4", *FEW]),
    "HSDP": ("tied", 4, ["data_parallel_replicate_dim=2", "batch_size=1", *FEW]),
    "FSDP x TP": ("untied", 4, ["tensor_parallel_dim=2", *FEW]),
    "compiled": ("tied", 2, ["compile=true", *FEW]),
    "copy, validated, gathered weights kept": ("copy", 2, ["fsdp_reshard_after_forward=false"]),
    "adapter beside its model, validated, checkpointed": ("adapter", 2, ["ac_mode=full"]),
}  # fmt: skip
# name: (the case whose checkpoint is taken up, None for one process; config; checkpoint; processes, overrides)
RESUMED = {
    "1 to 2, whole": (None, "tied", "epoch_0", 2),
    "1 to 2, optimizer in backward": (None, "in_backward", "step_6", 2),
    "1 to 2, DoRA with a copy": (None, "dora", "step_6", 2),
    "2 to 1, DoRA with a copy": ("DoRA with a copy", "dora", "step_6", 1),
    "2 to 1, shards": ("FSDP", "tied", "step_6", 1),
    "2 to 1, optimizer in backward": ("optimizer in backward", "in_backward", "epoch_0", 1),
    "2 to 2, FSDP to TP": ("untied, both apart", "untied", "step_6", 2, "tensor_parallel_dim=2", "batch_size=4"),
    "1 to 2, copy": (None, "copy", "epoch_0", 2),
    "2 to 1, adapter": ("adapter beside its model, validated, checkpointed", "adapter", "step_6", 1),
}


def config_changes(kind, folder, tokenizer, checkpoint):
    """The keys by which the config `kind` differs from that of all."""

    def scratch(model, model_type="LLAMA3_2", **changes):
        """A model, and the checkpointer of its start without weights."""
        section = {
            "_component_": "layerskip_recipes.checkpoint.scratch_checkpointer",
            "model_type": model_type,
            "output_dir": "${output_dir}",
            "tokenizer_dir": str(tokenizer),
            "hf_config": HF_CONFIG | changes,
        }
        return {"model": model, "checkpointer": section}

    two_heads = {"num_kv_heads": 2}
    held_out = {"dataset_val": texts(folder) | {"split": "train[:5]"}}  # which no two ranks share evenly
    if kind in DRAFTS:
        draft = {"draft": DRAFTS[kind] | {"exit_layer": 2}, "early_exit_loss": None}
        return draft | held_out | {"checkpointer": start_section(checkpoint)}
    if kind == "dora":
        beside = {"draft": {"kind": "copy", "exit_layer": 2, "finetune_model": True}, "early_exit_loss": None}
        return beside | {"model": LORA, "checkpointer": start_section(checkpoint)}
    if kind == "qlora":
        (folder / "wide").mkdir()
        torch.manual_seed(0)
        plain = widen(llama3_2(**{name: QLORA[name] for name in SIZE}), 0.1)
        torch.save(plain.state_dict(), folder / "wide" / "model.pt")
        return {"model": QLORA, "checkpointer": start_section(folder / "wide", "TorchTune", "model.pt")}
    if kind == "gemma2":  # its cap is so low that it caps
        make_hf_folder("gemma2", folder / "Gemma2", vocab_size=300, final_logit_softcapping=1.0)
        return hf_sections(folder / "Gemma2")
    if kind == "untied":
        return scratch(UNTIED | two_heads, "LLAMA2", num_key_value_heads=2, tie_word_embeddings=False) | UNSPLIT
    if kind in ("dropped", "validated"):
        held_out["run_val_every_n_steps"] = 1
        dropout = {"layer_dropout": {"prob": 0.5, "inverted": True}} if kind == "dropped" else {}
        return scratch(MODEL | two_heads, num_key_value_heads=2) | UNSPLIT | held_out | dropout
    return {"optimizer_in_bwd": True, "clip_grad_norm": None} if kind == "in_backward" else {}


@pytest.fixture(scope="module", autouse=True)
def no_inductor():
    """Graphs are what sharding may break. Inductor's code for them takes a minute, and test_finetune.py tests it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_COMPILE_BACKEND", "eager")  # for layers; the loss takes the default
        patch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def saves(case, kind):
    """The overrides of a run whose shards are taken up later."""
    return SAVES if any(s[:2] == (case, kind) and s[2].startswith("step") for s in RESUMED.values()) else []


@pytest.fixture(scope="module")
def one(folder, tokenizer_folder, checkpoint):
    """The run of a config in this process: its output folder, whose parent has finetune.yaml."""

    def run(kind, *overrides):
        out = folder / kind / " ".join(["one", *overrides])
        if not out.exists():
            changes = STEPS | config_changes(kind, folder, tokenizer_folder, checkpoint)
            path = finetune_config(folder / kind, tokenizer_folder, dataset=texts(folder), **changes)
            train(path, f"output_dir={out}", "batch_size=4", *saves(None, kind), *overrides)
        return out

    return run


@pytest.fixture(scope="module")
def several(one):
    """The run of a case on its processes: that of the same on one, and its own output folder."""

    def run(name):
        kind, processes, overrides = CASES[name]
        alone = one(kind, *(override for override in overrides if override in FEW))
        out, path = alone.parent / name, alone.parent / "finetune.yaml"
        overrides = [f"output_dir={out}", *overrides, *saves(name, kind)]
        if not out.exists():
            train_on_ranks(path, *overrides, processes=processes)
        return alone, out

    return run


def same_losses(one, other, steps):
    """All that both logged, but the speed."""
    one, other = losses(one), losses(other)
    assert sorted(other) == list(steps)
    for step in steps:
        assert other[step] == pytest.approx(one[step], abs=1e-5, rel=1e-5)  # a perplexity is large


def same_weights(one, other):
    """The last checkpoints with their drafts, as other tools read them."""
    read = {".safetensors": load_file, ".bin": torch.load}
    ours, theirs = (
        {
            (file.parent.name, name): value
            for file in sorted(out.glob("epoch_*"))[-1].rglob("*")
            if file.suffix in read
            for name, value in read[file.suffix](file).items()
        }
        for out in (one, other)
    )
    assert ours
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_no_split_changes_losses_and_weights(several, name):
    """Nor anything else that is logged, in 8 steps or 3; validation begins before the first."""
    first = 0 if "validated" in name else 1
    same_losses(*several(name), range(first, 4 if FEW[0] in CASES[name][2] else 9))
    same_weights(*several(name))


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_resumed_on_other_processes_is_the_run_of_one(one, several, name):
    case, kind, checkpoint, processes, *overrides = RESUMED[name]
    alone = one(kind)
    out = keep_only(several(case)[1] if case else alone, checkpoint, alone.parent / name)
    path = alone.parent / "finetune.yaml"
    overrides += [f"output_dir={out}", "resume_from_checkpoint=true"]
    if processes == 1:
        train(path, "batch_size=4", *overrides)
    else:
        train_on_ranks(path, *overrides)
    same_losses(alone, out, range(5 if checkpoint == "epoch_0" else 7, 9))
    same_weights(alone, out)


def test_resume_on_as_many_ranks_draws_what_the_run_would_have_drawn(tmp_path, finetune):
    """Layer dropout, which all ranks draw alike, and the attention's, which each draws for itself."""
    path = finetune(
        model=MODEL | {"attn_dropout": 0.3}, dataset=texts(tmp_path), layer_dropout={"prob": 0.5, "inverted": True},
        max_steps_per_epoch=5, save_every_n_steps=2, enable_async_checkpointing=True,
    )  # fmt: skip
    train_on_ranks(path)
    out = tmp_path / "out"
    again = keep_only(out, "step_2", tmp_path / "again")
    train_on_ranks(path, f"output_dir={again}", "resume_from_checkpoint=true")
    never_stopped, later = losses(out), losses(again)
    assert sorted(later) == [3, 4, 5]
    assert all(later[step] == pytest.approx(never_stopped[step], abs=1e-6) for step in later)
    same_weights(out, again)
