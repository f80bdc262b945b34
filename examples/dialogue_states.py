"""Write train.jsonl and test.jsonl for the `qa/*` configs, from a public data set of dialogues with an assistant.

    git clone --depth 1 https://github.com/google-research-datasets/dstc8-schema-guided-dialogue
    python examples/dialogue_states.py dstc8-schema-guided-dialogue states

    input:  {"system": what to answer, and a line of JSON for each service: its intents and slots, with fixed values,
             "user": "User: A table for two in Oslo, please.\\nAssistant: At what time?\\nUser: At seven."}
    output: {"Restaurants_1":{"intent":"Book","slots":{"city":"Oslo","seats":"2","time":"seven"},"requested":[]}}

The data are the Schema-Guided Dialogue data set (CC BY-SA 4.0), whose paper is https://arxiv.org/abs/1909.05855. The
script keeps its split, in which most services of test dialogues are in no training dialogue. It takes each dialogue up
to a turn of the user, which a hash chooses. Prompts of more than 3,000 characters (about 800 tokens) are left out.
"""

import json
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qa_files import write_splits

INSTRUCTION = "Reply with the state of the dialogue as JSON. These services, with their intents and slots, are in use:"
MAX_CHARACTERS = 3000
SPEAKERS = {"USER": "User", "SYSTEM": "Assistant"}


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def described(service: Mapping[str, Any]) -> str:
    """A service's intents and slots, which have the values of slots that take no others."""
    slots = {slot["name"]: slot["possible_values"] if slot["is_categorical"] else [] for slot in service["slots"]}
    return as_json({service["service_name"]: {"intents": [i["name"] for i in service["intents"]], "slots": slots}})


def state(frame: Mapping[str, Any]) -> dict[str, Any]:
    """What the user wants of a service. A value may have been said in several ways, the first of which counts."""
    known = frame["state"]
    slots = {name: values[0] for name, values in known["slot_values"].items()}
    return {"intent": known["active_intent"], "slots": slots, "requested": known["requested_slots"]}


def make_line(dialogue: Mapping[str, Any], services: Mapping[str, str]) -> dict[str, Any]:
    turns = dialogue["turns"]
    of_user = [i for i, turn in enumerate(turns) if turn["speaker"] == "USER"]
    last = of_user[zlib.crc32(dialogue["dialogue_id"].encode()) % len(of_user)]
    said = [f"{SPEAKERS[turn['speaker']]}: {turn['utterance']}" for turn in turns[: last + 1]]
    frames = turns[last]["frames"]
    system = "\n".join([INSTRUCTION, *(services[frame["service"]] for frame in frames)])
    answer = {frame["service"]: state(frame) for frame in frames}
    return {"input": {"system": system, "user": "\n".join(said)}, "output": as_json(answer)}


def lines(folder: Path) -> list[dict[str, Any]]:
    """A line for each dialogue of a split, in a mixed but fixed order."""
    services = {s["service_name"]: described(s) for s in json.loads((folder / "schema.json").read_text("utf-8"))}
    dialogues = [d for file in sorted(folder.glob("dialogues_*.json")) for d in json.loads(file.read_text("utf-8"))]
    dialogues.sort(key=lambda dialogue: zlib.crc32(dialogue["dialogue_id"].encode()))
    made = (make_line(dialogue, services) for dialogue in dialogues)
    return [line for line in made if sum(map(len, line["input"].values())) <= MAX_CHARACTERS]


def main() -> None:
    data, folder = Path(sys.argv[1]), Path(sys.argv[2])
    write_splits(folder, {split: lines(data / split) for split in ("train", "test")}, "dialogues")


if __name__ == "__main__":
    main()
