"""How a config says to decode: the sampler, and the `self_speculation` section with its checks and what it builds."""

import copy
import inspect
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torchtune.modules import TiedLinear, TransformerDecoder

from layerskip_recipes.checkpoint.weights import quantise
from layerskip_recipes.config.checks import check_number
from layerskip_recipes.config.settings import check_component, check_section
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.drafting.tree_shape import DraftTree
from layerskip_recipes.generation.sampling import Sampler
from layerskip_recipes.generation.steps import head_of
from layerskip_recipes.model.decoder import LayerSkipDecoder

# What a sampler takes beside the temperature.
FILTERS = ("top_k", "top_p", "min_p", "repetition_penalty")


def sampler_of(cfg: DictConfig, temperature: float, rng: torch.Generator | None = None) -> Sampler:
    """The sampler of a config at a temperature; raises a ValueError for a setting out of range."""
    return Sampler(temperature, **{key: cfg[key] for key in FILTERS if cfg.get(key) is not None}, rng=rng)


def self_speculation(
    exit_layer: int | Sequence[int] | None = None,
    num_speculations: int | None = None,
    tree_width: int = 1,
    tree_children: int = 1,
    threshold: float | str | None = None,
    draft_vocabulary: int | Sequence[int] | None = None,
    draft_vocabulary_file: str | None = None,
    prompt_lookup: int | None = None,
    draft_quantizer: Any = None,
) -> dict[str, Any]:
    """The keys of the section.

    Args:
        exit_layer: the exit that drafts (1..L), or a list of exits, of which the fastest is found by measuring.
        num_speculations: tokens drafted per round; the depth of a tree.
        tree_width: nodes that each level of a draft tree expands; 1 is a chain.
        tree_children: candidates from each of them.
        threshold: a confidence in [0, 1] below which a draft stops, or "auto".
        draft_vocabulary: the tokens that can be drafted: how many of the most frequent ones, or their ids.
        draft_vocabulary_file: a text in which they are counted; null counts in the prompts of the run.
        prompt_lookup: draft from the text where its last so many tokens occurred before.
        draft_quantizer: quantises the layers and the head that draft; verification stays in full precision.
    """
    return dict(locals())


def check_speculation(section: DictConfig, model: TransformerDecoder, key: str = "self_speculation") -> dict[str, Any]:
    """The section's values, after all checks that need neither weights nor tokens.

    Args:
        section: the plain section.
        model: the decoder that it is for, on any device.
        key: its name, for messages.

    Raises:
        ValueError: the key, what was given, what is allowed.
    """
    arguments = dict(check_section(section, key, self_speculation))
    for name, example in (("exit_layer", 8), ("num_speculations", 6)):
        if arguments.get(name) is None:
            raise ConfigError(
                f"{key}.{name}: missing; for example {key}.{name}={example}. To take all tokens from an early exit "
                f"set exit_layer and {key}=null"
            )
    values = self_speculation(**arguments)
    exits = values["exit_layer"] if isinstance(values["exit_layer"], list) else [values["exit_layer"]]
    if not exits or len(set(map(str, exits))) != len(exits):
        raise ConfigError(f"{key}.exit_layer: {exits} holds no exit, or one twice; for example {key}.exit_layer=[4,8]")
    for exit_layer in exits:
        model.check_exit(exit_layer, f"{key}.exit_layer")
    vocabulary, file = values["draft_vocabulary"], values["draft_vocabulary_file"]
    if vocabulary is not None and not isinstance(vocabulary, list):
        check_number(f"{key}.draft_vocabulary", vocabulary, minimum=1, example=4096)
    if file is not None and (not isinstance(file, str) or isinstance(vocabulary, list | None)):
        raise ConfigError(
            f"{key}.draft_vocabulary_file: {file!r} needs a number of tokens too, for example "
            f"{key}.draft_vocabulary=4096 {key}.draft_vocabulary_file=corpus.txt"
        )
    if file is not None and not Path(file).is_file():
        raise ConfigError(f"{key}.draft_vocabulary_file: {file!r} is not a file; for example corpus.txt")
    if values["draft_quantizer"] is not None:
        if isinstance(values["draft_quantizer"], dict):
            values["draft_quantizer"] = OmegaConf.create(values["draft_quantizer"])
        check_component(values["draft_quantizer"], f"{key}.draft_quantizer")
    try:
        _speculation(values, vocabulary if isinstance(vocabulary, list) else None).check(model)
    except ValueError as e:
        raise ConfigError(_of_section(str(e), key)) from e
    return values


def _of_section(message: str, key: str) -> str:
    """A message about arguments of `Speculation` as one about keys of the section, the lines that it suggests too."""
    names = "|".join(inspect.signature(self_speculation).parameters)
    return re.sub(rf"(?<![\w.])(?:{names})(?=[:=])", lambda name: f"{key}.{name[0]}", message)


def _speculation(values: dict[str, Any], vocabulary: Any, drafter: LayerSkipDecoder | None = None) -> Speculation:
    others = ("draft_vocabulary", "draft_vocabulary_file", "draft_quantizer")
    plain = {name: value for name, value in values.items() if name not in others}
    return Speculation(**plain, draft_vocabulary=vocabulary, drafter=drafter)


def tree_of(values: dict[str, Any], greedy: bool) -> DraftTree:
    """The shape of a round's drafts; of a chain too."""
    return DraftTree(values["num_speculations"], values["tree_width"], values["tree_children"], greedy)


def spare_slots(values: dict[str, Any], greedy: bool) -> int:
    """The slots of a draft tree; 0 for a chain, whose drafts stand where text will."""
    tree = tree_of(values, greedy)
    return 0 if tree.is_chain else tree.nodes


def weight_bytes(
    model: TransformerDecoder, dtype: torch.dtype, kept_layers: int = 0, shards: int = 1, parallel: int = 1
) -> int:
    """The bytes of the weights that each process holds, see `distributed.shard_decoder`.

    Args:
        model: the decoder, on any device, not yet split.
        dtype: of the weights.
        kept_layers: the layers below it are whole on every process.
        shards: processes over which the others are sharded.
        parallel: processes that share each matrix.
    """
    late = sum(parameter.numel() for parameter in model.layers[kept_layers:].parameters())
    early = sum(parameter.numel() for parameter in model.parameters()) - late
    return (early + late // shards) // parallel * dtype.itemsize


def with_vocabulary(
    values: dict[str, Any],
    model: LayerSkipDecoder,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    key: str = "self_speculation",
) -> dict[str, Any]:
    """The values with the ids of the draft vocabulary in place of their number.

    Args:
        values: of `check_speculation`.
        model: the decoder, on any device.
        tokenizer: for draft_vocabulary_file.
        prompts: tokens of the prompts, counted if there is no such file.
        key: the section's name, for messages.

    Raises:
        ValueError: if there are too few for the tree.
    """
    number = values["draft_vocabulary"]
    if not isinstance(number, int):
        return values
    texts = prompts
    if values["draft_vocabulary_file"] is not None:
        text = Path(values["draft_vocabulary_file"]).read_text(encoding="utf-8", errors="replace")
        texts = [tokenizer.encode(text, add_bos=False, add_eos=False)]
    counts = Counter(token for tokens in texts for token in tokens)
    vocabulary = [token for token, _ in counts.most_common(number)]
    _speculation(values, vocabulary).check(model, f"{key}.")
    return values | {"draft_vocabulary": vocabulary}


def build_speculation(values: dict[str, Any], model: LayerSkipDecoder) -> Speculation:
    """The speculation of checked values, with its quantised layers.

    Args:
        values: of `with_vocabulary`.
        model: with its weights.

    Raises:
        ValueError: if the quantiser does not work on this device.
    """
    drafter = None
    if values["draft_quantizer"] is not None:
        exits = values["exit_layer"]
        depth = max(exits) if isinstance(exits, list) else exits
        drafter = quantised_drafter(model, depth, values["draft_quantizer"], values["draft_vocabulary"] is None)
    return _speculation(values, values["draft_vocabulary"], drafter)


def check_draft_fits(cfg: DictConfig, model: TransformerDecoder, parallel: int = 1) -> None:
    """Raises a ValueError for drafts that a quantised or split model does not allow.

    Args:
        cfg: `self_speculation` and `quantizer` are read.
        model: of the config, on any device.
        parallel: the ranks that share each matrix.
    """
    section, quantizer = cfg.get("self_speculation") or {}, cfg.get("quantizer")
    packed = quantizer is not None and not isinstance(model.output, TiedLinear)
    if section.get("draft_vocabulary") is not None and (packed or parallel > 1):
        why = f"tensor_parallel_dim {parallel} splits" if parallel > 1 else "the quantizer packs"
        raise ConfigError(
            f"self_speculation.draft_vocabulary: needs rows of the model's head, which {why}; "
            "self_speculation.draft_vocabulary=null"
        )
    if section.get("draft_quantizer") is not None and quantizer is not None:
        raise ConfigError(
            "self_speculation.draft_quantizer: does nothing beside quantizer, which packs the layers that draft too. "
            "Set one of them null; for example quantizer=null"
        )


def quantised_drafter(
    model: LayerSkipDecoder, depth: int, quantizer: DictConfig, with_head: bool = True
) -> LayerSkipDecoder:
    """The first `depth` layers and the head, copied and quantised; embedding and norm are the model's own.

    Args:
        model: the model, left as it is.
        depth: the deepest exit that drafts.
        quantizer: as for `quantise`.
        with_head: False leaves the head, as where drafts have one of their own.

    Raises:
        ValueError: if the quantiser cannot do it here.
    """
    # The table of positions is one for all layers, and of a long context as large as a layer in int8.
    shared = {id(layer.attn.pos_embeddings): layer.attn.pos_embeddings for layer in model.layers}
    parts = [copy.deepcopy(layer, dict(shared)) for layer in model.layers[:depth]]
    if with_head:
        source = head_of(model)  # of a tied head the embedding, whose rows are looked up in full precision
        state = {name: value for name, value in source.named_parameters() if name in ("weight", "bias")}
        head = torch.nn.Linear(*reversed(source.weight.shape), bias="bias" in state, device="meta")
        head.load_state_dict(state, assign=True)
        parts.append(head)
    drafter = copy.copy(model)
    # A module's registries are shared by a plain copy.
    drafter._modules = dict(model._modules)
    packed = quantise(torch.nn.ModuleList(parts), quantizer, "self_speculation.draft_quantizer")
    drafter.layers = packed[:depth]
    if with_head:
        drafter.output = packed[depth]
    return drafter
