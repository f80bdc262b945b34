"""Bad input: one ValueError with the key, the value given and what is allowed, before weights are loaded or written.

The tables hold overrides, since each of them could stand in the YAML file as well: one row for each rule.
test_broken_files.py tries odd values for all keys.
"""

from itertools import cycle

import pytest
from helpers.configs import MODEL
from helpers.refusals import RECIPES, check

pytestmark = pytest.mark.slow

# Overrides, the key at the message's start (or the section that it is in), the value given, what is allowed.
# The rules that all recipes share; each is tried with one of them, in turns.
ANY = [
    ("device=xpu", "device", "'xpu'", "Allowed here: cpu"),
    ("dtype=fp16", "dtype", "'fp16'", "fp32, bf16"),
    ("seed=4294967295", "seed", "4294967295", "0 to 2147483647"),
    ("model=torchtune.models.llama3_2.lama", "model._component_", "'torchtune.models.llama3_2.lama'", "lama"),
    ("model=no_such_package.model", "model._component_", "'no_such_package.model'", "installed"),
    ("model=os.getcwd", "model", "os.getcwd builds a str", "TransformerDecoder"),
    ("model.num_layer=3", "model.num_layer", "no such argument", "Nearest: num_layers"),
    ("~model.num_layers", "model.num_layers", "missing", "model.num_layers="),
    ("model.num_heads=3", "model", "(3)", "divisible"),
    ("tokenizer.path=/nowhere", "tokenizer.path", "/nowhere", "no folder"),
    ("tokenizer.max_seq_len=0", "tokenizer.max_seq_len", "0", "2048"),
    ("tokenizer=torchtune.models.llama3.llama3_tokenizer; tokenizer.path=/no", "tokenizer", "/no", "No such file"),
    ("checkpointer.checkpoint_dir=/nowhere", "checkpointer.checkpoint_dir", "'/nowhere'", "folder"),
    ("checkpointer.checkpoint_dir=.", "checkpointer.checkpoint_files", "config.json", "There: "),
    ("checkpointer.checkpoint_dir=null", "checkpointer.checkpoint_dir", "missing", "folder"),
    ("checkpointer.checkpoint_files=[a.bin, model.safetensors]", "checkpointer.checkpoint_files", "a.bin", "There: "),
    ("checkpointer.checkpoint_files=model.safetensors", "checkpointer.checkpoint_files", "'model.safetensors'", "list"),
    ("checkpointer.model_type=LLAMA9", "checkpointer.model_type", "'LLAMA9'", "LLAMA3_2"),
    ("checkpointer.recipe_checkpoint=a.pt", "checkpointer.recipe_checkpoint", "'a.pt'", "resume_from_checkpoint=true"),
    ("seed=${nowhere}", "seed", "'nowhere'", "not found"),
]

EVAL = [
    ("exits=2:2", "exits", "2:2", "selects nothing"),
    ("compare={checkpoint: {model_type: LLAMA3}}", "compare.checkpoint", "the name is that of", "compare={before"),
    ("compare={a: {checkpoint_dir: /nowhere}}", "checkpointer.checkpoint_dir", "'/nowhere'", "folder"),
    ("compare={a: {model_typ: LLAMA2}}", "compare.a.model_typ", "no such argument", "Nearest: model_type"),
    ("compare={a: {model_type: X}}", "compare", "'X'", "LLAMA3_2"),
    ("checkpointer.checkpoint_files=[]", "checkpointer.checkpoint_files", "missing", "weights"),
    ("top_k=1", "top_k", "1 is not honoured by this recipe", "Set top_k=null"),
    ("report=eval.yaml/exits.json", "report", "'eval.yaml'", "cannot be written"),
    ("picture=exits.txt", "picture", "'exits.txt'", ""),
    ("tasks=[arc_easy]", "tasks", "removed", "`lm_eval --model hf --model_args pretrained=out/epoch_0 --tasks"),
    ("self_speculation={exit_layer: 2}", "self_speculation", "not honoured", "self_speculation=null"),
]

VOCABULARY = "self_speculation.draft_vocabulary"
TALK = "prompt=interactive"
GENERATE = [
    ("self_speculation.draft_quantizer=null", "self_speculation.draft_quantizer", "draft_int8", "draft_int8=true"),
    ("self_speculation.exit_layer=5", "self_speculation.exit_layer", "5", "1..4"),
    (
        "self_speculation={exit_layer: null, prompt_lookup: null, answers: null}",
        "self_speculation.exit_layer",
        "null",
        "lookup=1",
    ),
    ("exit_layer=5; self_speculation=null", "exit_layer", "5", "1..4"),
    ("exit_layer=2", "exit_layer", "2", "self_speculation=null"),
    (f"{VOCABULARY}=[]", VOCABULARY, "no list", "0..299"),
    (f"{VOCABULARY}=[1,300]", VOCABULARY, "300", "0..299"),
    (f"{TALK}; {VOCABULARY}=9", VOCABULARY, "9", f"{VOCABULARY}=null"),
    ("stream=flase", "stream", "'flase'", "true, false"),
    ("checkpointer.checkpoint_files=[]", "checkpointer.checkpoint_files", "missing", "weights"),
    ("system_prompt=be", "system_prompt", "'be'", "prompt.system="),
    (f"{TALK}; batch_size=2", "batch_size", "2", "batch_size=1"),
    (f"{TALK}; output_file=a.jsonl", "output_file", "'a.jsonl'", "output_file=null"),
    ("output_file=generate.yaml/a.jsonl", "output_file", "'generate.yaml'", "in the way"),
    ("prompt=null", "prompt", "missing", "prompt_file=FILE"),
    ("prompt=[a, '']", "prompt", "''", "prompt.user="),
    (f"prompt={'x ' * 200}", "prompt", "tokens", "128 (max_seq_len)"),
    ("prompt={usr: hi}", "prompt", "{'usr': 'hi'}", "user: text"),
    ("prompt_file=nowhere.txt", "prompt_file", "'nowhere.txt'", "JSONL"),
]

BENCHMARK = [
    ("temperature=0.8", "temperature", "0.8", "temperatures lists them"),
    ("max_new_tokens=1000", "max_new_tokens", "1000", "up to "),
    ("prompt=[a, b, c]; batch_size=2", "batch_size", "2", "batch_size=1"),
    ("picture=benchmark.txt", "picture", "'benchmark.txt'", "picture.png"),
    ("prompt=null", "prompt", "missing", "prompt_file=FILE"),
    ("prompt=interactive", "prompt", "'interactive'", "prompt=["),
    ("stream=true", "stream", "True", "stream=null"),
    ("~variants", "variants", "None", "variants.chain.exit_layer=3"),
    ("variants.chain.exit_layer=9", "variants.chain.exit_layer", "9", "1..4"),
    ("variants.chain.num_speculation=3", "variants.chain.num_speculation", "unknown key", "Nearest: num_speculations"),
    ("variants.baseline.exit_layer=2", "variants.baseline", "taken", "variants.chain"),
    ("peers=[torchtune]", "peers", "removed", "python tools/compare_engines.py CONFIG --engine torchtune"),
    ("metrics=[rogueL]", "metrics", "rogueL", "rouge1, rouge2, rougeL, bleu, exact_match"),
    ("self_speculation={exit_layer: 2, num_speculations: 2}", "self_speculation", "2", "variants"),
]

RANDOM = "random_weights=true; prompt=null; prompt_tokens=8"
BENCHMARK += [
    (f"{RANDOM}; ~variants", "variants", "None has nothing to compare", "variants.chain.exit_layer=3"),
    (f"{RANDOM}; prompt_tokens=120", "max_new_tokens", "120 prompt tokens", "the model's 128 "),
    (f"{RANDOM}; stop_strings=[a]", "stop_strings", "random_weights has none", "needs a checkpoint"),
    (f"{RANDOM}; tune=true", "tune", "True needs a checkpoint", ""),
    ("tune=true; tune_extends=quickstart/generates", "tune_extends", "generates", "Nearest: quickstart/generate"),
    ("tune=true; tune_extends=quickstart/finetune", "tune_extends", "quickstart/finetune is not a valid", "unknown"),
]

STDLIB = "_component_: layerskip_recipes.quickstart.StdlibDataset"
STEP_LR = "lr_scheduler._component_=torch.optim.lr_scheduler.StepLR; lr_scheduler.step_size=1"
DRAFT = "layer_dropout=null; early_exit_loss=null; draft={kind: copy, exit_layer: 2}"
FUNCTION = "checkpointer._component_=test_errors.reader"
SMOOTHED = "loss=torch.nn.CrossEntropyLoss; loss.label_smoothing=0.1"
OURS = "model=null; model._component_=layerskip_recipes.layerskip_decoder"
BASED = "; ".join([OURS, *(f"model.base.{key}={value}" for key, value in MODEL.items())])
DROPPING = f"model={{_component_: layerskip_recipes.layerskip_decoder, base: {MODEL}, layer_dropout: {{prob: 0.1}}}}"
OFFLOADING, SHARDED = "enable_activation_offloading", "DistributedCheckpointer"
FINETUNE = [
    ("output_dir=null", "output_dir", "None", "output_dir="),
    # The run's checkpoints would stand among the files that it started from.
    ("output_dir=${checkpointer.checkpoint_dir}/out", "output_dir", "lies in", "output_dir="),
    ("output_dir=finetune.yaml/out", "output_dir", "'finetune.yaml/out'", "in the way"),
    (f"{OURS}; model.base=null", "model", "NoneType", ""),
    (f"{OURS}; model.base={{a: 3}}", "model", "_component_", ""),
    (f"{BASED}; model.layer_dropout.prb=0.1", "model.layer_dropout.prb", "unknown key", "prob"),
    (f"{BASED}; model.layer_dropout.prob=0.1", "layer_dropout", "in the model section", "layer_dropout=null"),
    # Optimizer, schedule, clipping.
    ("optimizer.lr=.nan", "optimizer", "nan", "Invalid learning rate"),
    ("optimizer.betas=[2,2]", "optimizer", "2", "beta"),
    (STEP_LR, "lr_scheduler", "torch.optim.lr_scheduler.StepLR", "num_training_steps"),
    ("optimizer_in_bwd=true; clip_grad_norm=1.5", "clip_grad_norm", "1.5", "null"),
    ("optimizer_in_bwd=true; gradient_accumulation_steps=2", "gradient_accumulation_steps", "2", "=1 or"),
    # Data, loss, logger, profiler.
    ("dataset={_component_: test_errors.preferences}", "collate_fn", "chosen_input_ids", "chat_dataset"),
    ("dataset.seq_len=1000", "dataset", "1000", "128"),
    ("gradient_accumulation_steps=99", "dataset", "99", "lower"),
    ("model.vocab_size=200", "tokenizer", "200", "own tokenizer"),
    ("collate_fn=torchtune.data.padded_collate_dpo", "collate_fn", "'torchtune.data.padded_collate_dpo'", "_sft"),
    ("collate_fn=torchtune.data.left_pad_sequence", "collate_fn", "cannot be used here", "padding_idx"),
    ("loss=torch.nn.MSELoss", "loss._component_", "MSELoss", "torch.nn.CrossEntropyLoss"),
    ("loss=torch.nn.CrossEntropyLoss; loss.reduction=sum", "loss", "'sum'", "mean"),
    ("loss=torch.nn.CrossEntropyLoss; loss.ignore_index=0", "loss.ignore_index", "0", "-100"),
    ("profiler={enabled: true, foo: 1}", "profiler.foo", "no such argument", "Allowed: active_steps"),
    # A word that is no flag would count as true.
    ("resume_from_checkpoint=flase", "resume_from_checkpoint", "'flase'", "true, false"),
    (f"{OFFLOADING}=true", OFFLOADING, "True", "checkpointing=true"),
    (f"{OFFLOADING}=true; enable_activation_checkpointing=true", OFFLOADING, "cpu", "cuda"),
    # Several processes, checkpoints, validation.
    ("custom_sharded_layers=[outputx]", "custom_sharded_layers", "'outputx'", "tok_embeddings"),
    ("custom_sharded_layers=output", "custom_sharded_layers", "'output'", "[tok_embeddings,output]"),
    ("fsdp_cpu_offload=true", "fsdp_cpu_offload", "True", "fsdp_cpu_offload=false"),
    ("tensor_parallel_dim=2", "tensor_parallel_dim", "2", "Allowed: 1"),
    ("data_parallel_replicate_dim=2", "data_parallel_replicate_dim", "2", "data_parallel_replicate_dim=1"),
    ("data_parallel_shard_dim=2", "data_parallel_shard_dim", "2", "data_parallel_shard_dim=-1"),
    (f"checkpointer=torchtune.training.{SHARDED}", "checkpointer._component_", SHARDED, "FullModelHFCheckpointer"),
    ("enable_async_checkpointing=true", "enable_async_checkpointing", "True", "save_every_n_steps"),
    ("resume_from_checkpoint=true", "resume_from_checkpoint", "out", "resume_from_checkpoint=false"),
    ("run_val_every_n_steps=5", "run_val_every_n_steps", "5", "dataset_val"),
    (f"dataset_val={{{STDLIB}, split: test}}", "dataset_val", "'test'", "train, heldout"),
    ("exits_val=1", "exits_val", "1", "dataset_val"),
    ("layers_val=1", "layers_val", "1", "exits_val, which counts from 1"),
    ("early_exit_loss.layers=1", "early_exit_loss.layers", "1", "replaced by exits, which count from 1"),
    (f"dataset_val={{{STDLIB}}}; exits_val=9", "exits_val", "9", "Allowed: exits 1..4 and slices"),
    (f"dataset_val={{{STDLIB}, split: heldout, seq_len: 1000}}", "dataset_val", "1000", "128"),
    # Our sections.
    ("~layer_dropout.prob", "layer_dropout.prob", "missing", "layer_dropout.prob=0.1"),
    ("early_exit_loss.curriculum=rotation", "early_exit_loss.curriculum", "'rotation'", "rotational, gradual"),
    ("early_exit_loss.exits=9", "early_exit_loss.exits", "9", 'for example ":"'),
    ("layer_dropout.layers=1-2", "layer_dropout.layers", "'1-2'", 'for example ":"'),
    ("early_exit_loss={exits: 1, curriculum: null}", "early_exit_loss.exits", "1", "scale_fn=uniform"),
    # Drafts.
    (f"{DRAFT}; draft.exit_layer=4", "draft.exit_layer", "4", "an integer of 1 to 3"),
    (f"{DRAFT}; layer_dropout={{prob: 0.1}}", "layer_dropout", "does not go with draft", ""),
    (f"{DRAFT}; {DROPPING}", "model.layer_dropout", "does not go with draft", ""),
    (f"{DRAFT}; {SMOOTHED}", "loss.label_smoothing", "0.1 does nothing with draft", ""),
    (f"{DRAFT}; checkpointer.checkpoint_files=[]", "draft", "this one has no weights", ""),
    (
        f"{DRAFT}; model._component_=torchtune.models.llama3_2._component_builders.lora_llama3_2; "
        "model.lora_attn_modules=[q_proj]; model.apply_lora_to_mlp=false; model.lora_rank=2; model.lora_alpha=4",
        "draft.finetune_model",
        "False",
        "draft.finetune_model=true",
    ),
    (f"{DRAFT}; model.num_layers=1", "draft", "this one has 1", "Set draft=null"),
    (f"{DRAFT}; draft.finetune_model=true; early_exit_loss={{scale: 0.1}}", "early_exit_loss", "draft", "Set "),
    (f"{DRAFT}; draft.finetune_model=true; {FUNCTION}", "checkpointer._component_", "test_errors.reader", "a class"),
]


def reader(checkpoint_dir, checkpoint_files, output_dir, model_type):
    """A function in the place of a checkpointer."""


def preferences(tokenizer) -> list[dict]:
    """A dataset of torchtune's preference recipes."""
    return [{"chosen_input_ids": [1, 2], "chosen_labels": [1, 2]}] * 8


ROWS = [(recipe, *row) for recipe, row in zip(cycle(RECIPES), ANY, strict=False)]
for recipe, table in {"eval": EVAL, "generate": GENERATE, "benchmark": BENCHMARK, "finetune": FINETUNE}.items():
    ROWS += [(recipe, *row) for row in table]


@pytest.mark.parametrize(("recipe", "overrides", "key", "given", "allowed"), ROWS)
def test_a_mistake_is_one_clear_error(recipe, overrides, key, given, allowed, paths):
    check(recipe, paths[recipe], overrides, key, given, allowed)
