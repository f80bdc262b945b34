"""load_model: a model, its tokenizer, and the settings with which it decodes fastest on this machine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torchtune import training, utils

from layerskip_recipes.checkpoint.drafts import read_draft
from layerskip_recipes.checkpoint.hf_checkpointer import HFCheckpointer
from layerskip_recipes.config.auto import best_device
from layerskip_recipes.config.schema import AUTO, DeviceName, Text, checked_arguments
from layerskip_recipes.data.tokenizer import HFTokenizer, hf_tokenizer
from layerskip_recipes.distributed.loading import make_position_tables
from layerskip_recipes.families.hf_decoder import hf_decoder
from layerskip_recipes.folders.model_folder import named_folder
from layerskip_recipes.generation.drafting.auto_drafts import DraftChooser, TrainingNotes
from layerskip_recipes.generation.drafting.draft_model import DraftModel, DraftModels
from layerskip_recipes.generation.drafting.section import SelfSpeculation
from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.kernels.compiling import find_compiled_steps
from layerskip_recipes.generation.kernels.when_to_compile import compiling_pays
from layerskip_recipes.model.decoder import LayerSkipDecoder, layerskip_decoder

log = utils.get_logger("INFO")

CALLS = 10  # expected number of calls in a session, to decide whether compiling pays


@checked_arguments()
def load_model(
    path: Text,
    *,
    draft: Text | None = None,
    device: DeviceName | None = None,
    dtype: Literal["fp32", "bf16"] | None = None,
) -> tuple[LayerSkipDecoder, HFTokenizer]:
    """Load a model in eval mode, and its tokenizer.

    `generate` then decodes with the settings that `layerskip_generate` would choose, see `DecodingChooser`.

    Args:
        path: a run of layerskip_finetune (loads its newest checkpoint), a checkpoint, a Hugging Face folder, or a name
            on the hub. A trained draft also loads the model that it was trained for, and a folder of PEFT's LoRA its
            base model, into which it is merged.
        draft: a run or a checkpoint with a draft trained for this model; None takes one that was trained beside it.
        device: such as "cpu" or "cuda:1"; None chooses the best device.
        dtype: "fp32" or "bf16"; None is fp32 on a CPU and bf16 elsewhere.

    Example:
        >>> model, tokenizer = load_model("out")                                         # doctest: +SKIP
        >>> out = generate(model, tokenizer.prompt("Why is the sky blue?"), 128)         # doctest: +SKIP
        >>> print(tokenizer.decode(out.tokens[0]), out.speedup)                          # doctest: +SKIP
    """
    folder = named_folder(path, weights=True)
    torch_device = torch.device(device or best_device())
    dtype = dtype or ("fp32" if torch_device.type == "cpu" else "bf16")
    torch_dtype = torch.float32 if dtype == "fp32" else torch.bfloat16
    # Build on the meta device: the weights are initialised only once, by the checkpoint.
    with training.set_default_dtype(torch_dtype), torch.device("meta"):
        model = layerskip_decoder(hf_decoder(str(folder)))
    model.to_empty(device=torch_device)
    make_position_tables(model, torch_device, torch_dtype)
    model.load_state_dict(HFCheckpointer(str(folder)).load_checkpoint()[training.MODEL_KEY])
    model.requires_grad_(False).eval()
    tokenizer = hf_tokenizer(str(folder))
    named = AUTO if draft is None else str(named_folder(draft, "draft", weights=True))
    notes = TrainingNotes(folder, model.num_layers, model.tok_embeddings.num_embeddings, HFCheckpointer)
    described, _ = notes.draft_for(SelfSpeculation(draft=named), "draft")
    trained_draft = None if described is None else read_draft(described, model, "draft")
    model.decoding_chooser = DecodingChooser(notes, named, DraftModels(trained_draft), tokenizer.stop_tokens)
    return model, tokenizer


@dataclass
class DecodingChooser:
    """Chooses how a loaded model decodes: the draft, its length, vocabulary and precision, and whether to compile."""

    notes: TrainingNotes
    named_draft: str  # its folder, or "auto"
    draft_models: DraftModels
    stop_tokens: Sequence[int]
    said: set[str] = field(default_factory=set)

    def choose(
        self,
        model: LayerSkipDecoder,
        prompts: Sequence[Sequence[int]],
        temperature: float,
        tokens: int,
        compile: bool | None,
        given: Mapping[str, Any] | None,
    ) -> tuple[bool, Speculation | None, DraftModel | None]:
        """Whether to compile (None: if a session of such calls gains by it), how to draft, and with what.

        `given` has keys of `self_speculation` that the caller set; None decodes without drafts.
        """
        section = None if given is None else SelfSpeculation.parse({**given, "draft": self.named_draft}, "generate")
        weight, asked = model.tok_embeddings.weight, section is not None and section.num_speculations != AUTO
        chooser = DraftChooser(model, self.notes, weight.device.type, weight.dtype)
        compiled = {c: chooser.choose(section, temperature, c, len(prompts), asked=asked) for c in (False, True)}
        if compile is None:
            steps, device = find_compiled_steps(model), weight.device
            pays, why = compiling_pays(compiled[False].token_s, compiled[True].token_s, CALLS * tokens, device)
            compile = pays or (steps is not None and not steps.failed)
            self._say(why)
        chosen = compiled[compile]
        if chosen.why is not None:
            self._say(chosen.why)
        speculation = chosen.speculation(prompts)
        return compile, speculation, self.draft_models.of(speculation, model, "draft")

    def _say(self, what: str) -> None:
        if what not in self.said:
            self.said.add(what)
            log.info(what)
