"""QLoRA and QDoRA: adapters on NF4 weights, their checkpoints, and generation with them."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.adapters import (
    TOKENS,
    WIDE,
    WIDE_HF,
    WIDE_PLAIN,
    EveryExit,
    adapter_config,
    by_hand,
    check_losses,
    generate_with,
    make_start,
    read_hf,
    tokens_of,
)
from helpers.training import few_texts, losses, read_log, set_up, train  # noqa: F401
from torchao.dtypes.nf4tensor import NF4Tensor, to_nf4

pytestmark = pytest.mark.slow


def quantised_run(folder: Path, tokenizer: Path, **changes) -> SimpleNamespace:
    """A QLoRA run: its start with the weights that NF4 makes of it, its first adapters, its recipe, its checkpoint."""
    start = make_start(folder / "start", "llama3_2", tokenizer, WIDE_PLAIN, **WIDE_HF)
    builder, dtype = WIDE | {"quantize_base": True, **changes.pop("builder", {})}, changes.get("dtype")
    path = adapter_config(folder, tokenizer, "llama3_2", folder / "start", builder, **changes)
    recipe = set_up(path)
    packed = {name: p for name, p in recipe.model.named_parameters() if isinstance(p, NF4Tensor)}
    for name, parameter in packed.items():
        unpacked, of_start = parameter.get_original_weight(), to_nf4(start[name]).get_original_weight()
        torch.testing.assert_close(unpacked.float(), of_start, atol=0, rtol=0.02 if dtype == "bf16" else 0)
    start |= {name: parameter.get_original_weight() for name, parameter in packed.items()}
    first = {name: p.detach().clone() for name, p in recipe.model.named_parameters() if p.requires_grad}
    recipe.train()
    recipe.cleanup()
    return SimpleNamespace(
        path=path, start=start, packed=set(packed), first=first, recipe=recipe, log=read_log(folder / "out"),
        folder=folder, checkpoint=folder / "out" / "epoch_0", family="llama3_2", plain=EveryExit(WIDE_PLAIN),
        adapters=torch.load(folder / "out" / "epoch_0" / "adapter_model.pt", weights_only=True),
    )  # fmt: skip


@pytest.fixture(scope="module", params=[{}, {"use_dora": True}], ids=["qlora", "qdora"])
def quantised(request, tmp_path_factory, tokenizer_folder) -> SimpleNamespace:
    return quantised_run(tmp_path_factory.mktemp("quantised"), tokenizer_folder, builder=request.param)


def check_exits(run: SimpleNamespace, weights: dict) -> None:
    """The trained model's logits at both exits are those of the plain decoder with these weights."""
    run.recipe.model.eval()
    with torch.no_grad():
        for exit_layer, logits in zip((1, 2), run.plain.logits(weights, TOKENS), strict=True):
            ours = run.recipe.model(TOKENS, exit_layer=exit_layer)
            torch.testing.assert_close(ours, logits, atol=1e-3, rtol=1e-3)


def test_qlora_trains_adapters_on_nf4_weights(quantised):
    """Its losses, and its exits at the end, are those of plain PyTorch on the weights that NF4 gives back. QDoRA's
    magnitudes start as the norms of those weights' rows."""
    assert len(quantised.packed) == 2 * 7
    for name, value in quantised.first.items():
        if name.endswith("magnitude"):
            norms = quantised.start[name.replace("magnitude", "weight")].norm(dim=1)
            torch.testing.assert_close(value, norms, atol=1e-4, rtol=1e-4)
    check_losses(quantised, rel=5e-4)
    for name, p in quantised.recipe.model.named_parameters():
        if isinstance(p, NF4Tensor):
            assert torch.equal(p.get_original_weight(), quantised.start[name])
    check_exits(quantised, by_hand(quantised.start, quantised.adapters))


def test_qloras_merged_checkpoint_is_the_formula(quantised):
    """With the NF4 weights unpacked, in the run's dtype."""
    merged, expected = read_hf(quantised.checkpoint, "llama3_2"), by_hand(quantised.start, quantised.adapters)
    assert set(merged) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(merged[name], value, atol=1e-5, rtol=1e-5)
        assert not torch.equal(value, quantised.start[name]) or name not in quantised.packed
    check_exits(quantised, merged)


def test_qlora_in_bf16(tmp_path, tokenizer_folder):
    run = quantised_run(tmp_path, tokenizer_folder, builder={"use_dora": True}, dtype="bf16")
    expected = by_hand({n: v.float() for n, v in run.start.items()}, {n: v.float() for n, v in run.adapters.items()})
    merged = read_hf(run.checkpoint, "llama3_2")
    assert {value.dtype for value in [*merged.values(), *run.adapters.values()]} == {torch.bfloat16}
    for name, value in expected.items():
        # DoRA's factor is in bf16 too.
        torch.testing.assert_close(merged[name].float(), value, atol=2**-6, rtol=2**-6)
    assert run.log[1]["loss"] != run.log[4]["loss"]


def test_generation_with_qlora_adapters_gives_the_merged_checkpoints_tokens(quantised, tmp_path):
    """NF4 weights are unpacked, so that decoding needs no other kernels."""
    with_adapters = generate_with(quantised, tmp_path / "adapters", quantised.checkpoint)
    merged = generate_with(quantised, tmp_path / "merged", None, model=WIDE_PLAIN)
    tokens = tokens_of(with_adapters)
    assert tokens == tokens_of(merged) == tokens_of(with_adapters, "self_speculation=null")
    assert len(set(tokens)) > 3
