"""The sections `layer_dropout` and `early_exit_loss` of a config, checked and built; and their names upstream."""

import torch
from omegaconf import DictConfig, OmegaConf
from torchtune import config
from torchtune.modules.loss import CEWithChunkedOutputLoss

from layerskip_recipes.config import check_component, check_section
from layerskip_recipes.early_exit import EarlyExitLoss
from layerskip_recipes.layer_dropout import LayerDropout

# torchtune's early-exit recipe names these by dotted path; here they have short names.
_UPSTREAM = "torchtune.modules.early_exit_loss."
UPSTREAM_CURRICULA = {
    _UPSTREAM + "RotationalEarlyExitCurriculum": "rotational",
    _UPSTREAM + "GradualEarlyExitCurriculum": "gradual",
}
UPSTREAM_SCALE_FNS = {
    _UPSTREAM + "uniform_loss_scale": "uniform",
    _UPSTREAM + "linear_l_loss_scale": "linear",
    _UPSTREAM + "sum_l_loss_scale": "layerskip",
    _UPSTREAM + "sqrt_l_loss_scale": "sqrt",
    _UPSTREAM + "inv_l_loss_scale": "inverse",
    _UPSTREAM + "inv_sqrt_l_loss_scale": "inverse_sqrt",
}


def layer_dropout_section(cfg: DictConfig, num_layers: int, seed: int) -> LayerDropout | None:
    """The `layer_dropout` section, checked and built."""
    given = ["num_layers", "seed"]
    section = cfg.get("layer_dropout")
    if isinstance(section, DictConfig) and "disable_on_eval" in section:
        # Upstream's key. Evaluation without dropout is the only way here.
        if section.disable_on_eval is not True:
            raise ValueError(f"layer_dropout.disable_on_eval: {section.disable_on_eval!r}; only true is supported")
        section = OmegaConf.masked_copy(section, [key for key in section if key != "disable_on_eval"])
    arguments = check_section(section, "layer_dropout", LayerDropout, given=given)
    if section is None:
        return None
    if "prob" not in arguments:
        raise ValueError("layer_dropout.prob: missing; for example layer_dropout.prob=0.1")
    return LayerDropout(num_layers, seed=seed, **arguments)


def loss_section(cfg: DictConfig, num_layers: int) -> EarlyExitLoss:
    """The `early_exit_loss` section over the `loss` section, checked and built. Without the former: the last exit."""
    component = check_component(cfg.get("loss"), "loss")
    base = config.instantiate(cfg.loss)
    given = {"ignore_index": getattr(base, "ignore_index", -100)}
    if isinstance(base, torch.nn.CrossEntropyLoss):
        given["label_smoothing"] = base.label_smoothing
        if base.weight is not None or base.reduction != "mean":
            raise ValueError("loss: class weights and another reduction than mean are not supported")
    elif isinstance(base, CEWithChunkedOutputLoss):
        given["min_chunks"] = base.num_output_chunks
    else:
        raise ValueError(
            f"loss._component_: {component.__name__} makes no early-exit loss. Allowed: torch.nn.CrossEntropyLoss, "
            "torchtune.modules.loss.CEWithChunkedOutputLoss"
        )
    if cfg.get("early_exit_loss") is None:
        return EarlyExitLoss(curriculum=None, layers=str(num_layers - 1), **given)
    arguments = check_section(cfg.early_exit_loss, "early_exit_loss", EarlyExitLoss, given=["ignore_index", "label_smoothing", "min_chunks"])
    upstream = arguments.get("curriculum") in UPSTREAM_CURRICULA
    arguments |= {
        key: short[arguments[key]]
        for key, short in (("curriculum", UPSTREAM_CURRICULA), ("scale_fn", UPSTREAM_SCALE_FNS))
        if arguments.get(key) in short
    }
    if upstream and arguments["curriculum"] == "rotational" and "interval" not in arguments:
        # There `layers` is the first set, and rotates through the whole model: "0::4" means every 4th layer.
        start, _, step = str(arguments.get("layers", ":")).partition("::")
        if not step.isdigit() or start not in ("", "0"):
            raise ValueError(
                f"early_exit_loss.layers: {arguments.get('layers')!r} says no interval for the rotation. "
                "Give it: curriculum: rotational, interval: 8"
            )
        arguments |= {"layers": ":", "interval": int(step)}
    return EarlyExitLoss(**arguments, **given)
