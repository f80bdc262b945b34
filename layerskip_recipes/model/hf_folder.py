"""Where a model's folder is: a path, a run of layerskip_finetune with its checkpoints, or a name on the hub."""

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

from layerskip_recipes.errors import ConfigError

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+$")
RECIPE_STATE = "recipe_state.pt"
WRITTEN = "written"  # holds the time of writing in seconds: the files' own times do not survive a copy
DOWNLOADED = ["*.json", "model*.safetensors", "*.jinja", "*.model"]


def model_folder(path: str) -> Path:
    """The folder of a model.

    Args:
        path: a folder, ~ allowed; a name on the hub, which is downloaded. Of a run of layerskip_finetune the newest
            checkpoint is taken.

    Raises:
        ConfigError: if there is no such folder, or the hub does not give it.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        inside = [path for path in complete_checkpoints(folder) if (path / "config.json").is_file()]
        return inside[-1] if inside and not (folder / "config.json").is_file() else folder
    if not HUB_NAME.fullmatch(path) or folder.is_absolute():
        raise ConfigError(f"path: {path!r} is no folder. Allowed: a folder with config.json, or a name on the hub")
    try:
        return Path(snapshot_download(path, allow_patterns=DOWNLOADED))
    except (HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, OSError, ValueError) as e:
        why = str(e).strip().partition("\n")[0]
        raise ConfigError(
            f"path: {path!r} is no folder here, and the hub does not give it ({why}). Allowed: a folder with "
            "config.json; a gated model needs a token, see huggingface-cli login"
        ) from e


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints under output_dir, the oldest first."""
    states = [*output_dir.glob(f"epoch_*/{RECIPE_STATE}"), *output_dir.glob(f"step_*/{RECIPE_STATE}")]
    return sorted((path.parent for path in states), key=written_at)


def written_at(checkpoint: Path) -> float:
    """The time at which a checkpoint was written, in seconds."""
    noted = checkpoint / WRITTEN
    return float(noted.read_text()) if noted.exists() else (checkpoint / RECIPE_STATE).stat().st_mtime
