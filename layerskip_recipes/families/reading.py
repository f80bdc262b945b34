"""Reads the config.json of a Hugging Face folder as the `HFConfig` of its family.

It refuses values that would change the model's output and that `hf_decoder` does not support.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layerskip_recipes.config.paths import read_json
from layerskip_recipes.config.schema import nearest
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.families.exaone4 import Exaone4
from layerskip_recipes.families.gemma import Gemma
from layerskip_recipes.families.gemma2 import Gemma2
from layerskip_recipes.families.gemma3 import Gemma3
from layerskip_recipes.families.granite import Granite, GraniteHybrid
from layerskip_recipes.families.hf_config import HFConfig
from layerskip_recipes.families.lfm2 import LFM2
from layerskip_recipes.families.llama import Llama
from layerskip_recipes.families.mistral import Mistral
from layerskip_recipes.families.olmo2 import Olmo2
from layerskip_recipes.families.olmo3 import Olmo3
from layerskip_recipes.families.phi3 import Phi3
from layerskip_recipes.families.qwen2 import Qwen2
from layerskip_recipes.families.qwen3 import Qwen3
from layerskip_recipes.families.smollm3 import SmolLM3

FAMILIES: dict[str, type[HFConfig]] = {
    "LlamaForCausalLM": Llama,
    "MistralForCausalLM": Mistral,
    "Qwen2ForCausalLM": Qwen2,
    "Qwen3ForCausalLM": Qwen3,
    "SmolLM3ForCausalLM": SmolLM3,
    "Phi3ForCausalLM": Phi3,
    "GemmaForCausalLM": Gemma,
    "Gemma2ForCausalLM": Gemma2,
    "Gemma3ForCausalLM": Gemma3,
    "GraniteForCausalLM": Granite,
    "GraniteMoeHybridForCausalLM": GraniteHybrid,
    "Lfm2ForCausalLM": LFM2,
    "Olmo2ForCausalLM": Olmo2,
    "Olmo3ForCausalLM": Olmo3,
    "Exaone4ForCausalLM": Exaone4,
}
# Why there is no class for some families, by the beginning of their names.
RECURRENT = "most of its layers keep a recurrent state, which cannot go back to before a rejected draft"
REFUSED = {
    "Qwen3_5": RECURRENT,
    "Qwen3Next": RECURRENT,
    "FalconH1": RECURRENT,
    "NemotronH": RECURRENT,
    "Gemma3n": "its layers have embeddings of their own, and some share keys",
    "Gemma4": "its layers have embeddings of their own, and some share keys",
}
# Models that also read images, and their text models.
TEXT_PARTS = {"Gemma3ForConditionalGeneration": "Gemma3ForCausalLM"}


def read_hf_config(folder: Path, key: str = "path") -> HFConfig:
    """The config of a Hugging Face folder; `key` is the folder's config key in messages."""
    return parse_hf_config(read_json(folder / "config.json", key), str(folder / "config.json"))


def text_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a folder's text model: for a model that also reads images, a section of its own."""
    text_model = TEXT_PARTS.get(_architecture(raw))
    if text_model is None:
        return dict(raw)
    tokens = {key: raw[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in raw}
    return tokens | raw.get("text_config", {}) | {"architectures": [text_model]}


def _architecture(raw: Mapping[str, Any]) -> str:
    return next(iter(raw.get("architectures") or ["missing"]))


def parse_hf_config(raw: Mapping[str, Any], name: str) -> HFConfig:
    """The config from the content of a config.json; `name` is the file's in messages."""
    raw = text_config(raw)
    architecture = _architecture(raw)
    if architecture not in FAMILIES:
        reasons = [f": {why}" for family, why in REFUSED.items() if architecture.startswith(family)]
        why = next(iter(reasons), "")
        raise ConfigError(
            f"{name}: the architecture {architecture} is not supported{why}. {nearest(architecture, FAMILIES)}"
        )
    family = FAMILIES[architecture]
    config = family.parse(family.values(raw) | {"architecture": architecture}, name)
    if mistakes := [f"{name}.{mistake}" for mistake in config.mistakes(raw)]:
        raise ConfigError(*mistakes)
    return config
