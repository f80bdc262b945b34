"""Spoken commands and their parses in the style of TOPv2: a narrow task for finetuning that needs no download.

    command: play golden rivers by amy
    parse:   [IN:PLAY_MUSIC play [SL:MUSIC_TRACK_TITLE golden rivers ] by [SL:MUSIC_ARTIST_NAME amy ] ]

A command is its parse without the brackets, which mark intents (IN) and slots (SL). Every template has a slot whose
test values never occur in training.
"""

import random
import re
from typing import Annotated, Any, Literal

from pydantic import Field

from layerskip_recipes.config.schema import PositiveInt, checked_arguments
from layerskip_recipes.data.replies import Example, ReplyDataset

Split = Literal["train", "test"]

# Templates by domain. {name} stands for a value from `VALUES`, `UNSEEN` or `PHRASES`, (a|b|) for one of the texts.
TEMPLATES = {
    "alarm": (
        "[IN:CREATE_ALARM (please |can you |)set an alarm called [SL:ALARM_NAME {hobby} ] [SL:DATE_TIME {when} ] ]",
        "[IN:CREATE_ALARM wake (me|us) up [SL:DATE_TIME {when} ] for [SL:ALARM_NAME {hobby} ] ]",
        "[IN:DELETE_ALARM (cancel|delete|turn off) my [SL:ALARM_NAME {hobby} ] alarm [SL:DATE_TIME {day} ] ]",
        "[IN:UPDATE_ALARM (move|change) the [SL:ALARM_NAME {hobby} ] alarm to [SL:DATE_TIME {time} ] ]",
    ),
    "event": (
        "[IN:GET_EVENT (find|show me|are there any) [SL:CATEGORY_EVENT {kind} ] in [SL:LOCATION {city} ] "
        "[SL:DATE_TIME {day} ] ]",
        "[IN:GET_EVENT what is there to do near [SL:LOCATION {city} ] [SL:DATE_TIME {day} ] ]",
        "[IN:CREATE_EVENT (put|add) [SL:NAME_EVENT {hobby} ] with [SL:ATTENDEE {name} ] on my calendar "
        "[SL:DATE_TIME {when} ] ]",
        "[IN:CANCEL_EVENT call off [SL:NAME_EVENT {hobby} ] with [SL:ATTENDEE {name} ] (|please )]",
    ),
    "messaging": (
        "[IN:SEND_MESSAGE (tell|message|text) [SL:RECIPIENT {name} ] that [SL:CONTENT_EXACT {text} ] ]",
        "[IN:SEND_MESSAGE (send|write) a message to [SL:RECIPIENT {name} ] and [SL:RECIPIENT {name} ] saying "
        "[SL:CONTENT_EXACT {text} ] ]",
        "[IN:GET_MESSAGE (read|show me) the [SL:ORDINAL {which} ] message from [SL:SENDER {name} ] ]",
        "[IN:SEND_MESSAGE ask [SL:RECIPIENT {name} ] [SL:CONTENT_EXACT if {text} ] ]",
    ),
    "music": (
        "[IN:PLAY_MUSIC (play|start|i want to hear) [SL:MUSIC_TRACK_TITLE {song} ] by [SL:MUSIC_ARTIST_NAME {band} ] ]",
        "[IN:PLAY_MUSIC (play|put on) some [SL:MUSIC_GENRE {genre} ] by [SL:MUSIC_ARTIST_NAME {band} ] ]",
        "[IN:ADD_TO_PLAYLIST_MUSIC add [SL:MUSIC_TRACK_TITLE {song} ] to my [SL:MUSIC_PLAYLIST_TITLE {hobby} ] "
        "[SL:MUSIC_TYPE playlist ] ]",
        "[IN:LOOP_MUSIC (repeat|loop) [SL:MUSIC_TRACK_TITLE {song} ] [SL:ORDINAL {which} ] time ]",
    ),
    "navigation": (
        "[IN:GET_DIRECTIONS (give me|i need) directions from [SL:SOURCE {city} ] to [SL:DESTINATION {city} ] ]",
        "[IN:GET_DIRECTIONS how do i get to [SL:DESTINATION [IN:GET_LOCATION_HOME [SL:CONTACT {name} ] 's house ] ] "
        "avoiding [SL:OBSTRUCTION_AVOID {obstacle} ] ]",
        "[IN:GET_ESTIMATED_DURATION how long (will it take|is the drive) to [SL:DESTINATION {city} ] if i leave "
        "[SL:DATE_TIME_DEPARTURE {when} ] ]",
        "[IN:GET_INFO_TRAFFIC is there (heavy|any|much) traffic on the way to [SL:DESTINATION {city} ] "
        "[SL:DATE_TIME {day} ] ]",
    ),
    "reminder": (
        "[IN:CREATE_REMINDER remind [SL:PERSON_REMINDED me ] [SL:DATE_TIME {when} ] to [SL:TODO {todo} ] ]",
        "[IN:CREATE_REMINDER (please |)remind [SL:PERSON_REMINDED {name} ] to [SL:TODO {todo} ] "
        "[SL:DATE_TIME {day} ] ]",
        "[IN:DELETE_REMINDER (forget|delete|remove) [SL:PERSON_REMINDED my ] reminder to [SL:TODO {todo} ] ]",
        "[IN:UPDATE_REMINDER_DATE_TIME move the reminder to [SL:TODO {todo} ] to [SL:DATE_TIME_NEW {when} ] ]",
    ),
    "timer": (
        "[IN:CREATE_TIMER (start|set) a [SL:METHOD_TIMER timer ] called [SL:TIMER_NAME {thing} ] "
        "[SL:DATE_TIME for {length} ] ]",
        "[IN:ADD_TIME_TIMER add [SL:DATE_TIME {length} ] to the [SL:TIMER_NAME {thing} ] [SL:METHOD_TIMER timer ] ]",
        "[IN:GET_TIMER how much time is left on the [SL:TIMER_NAME {thing} ] [SL:METHOD_TIMER timer ] ]",
        "[IN:PAUSE_TIMER (stop|pause|hold) the [SL:TIMER_NAME {thing} ] [SL:METHOD_TIMER timer ] (|now )]",
    ),
    "weather": (
        "[IN:GET_WEATHER (what is|how is|tell me) the weather in [SL:LOCATION {city} ] [SL:DATE_TIME {day} ] ]",
        "[IN:GET_WEATHER (will it|is it going to) [SL:WEATHER_ATTRIBUTE {weather} ] in [SL:LOCATION {city} ] "
        "[SL:DATE_TIME {when} ] ]",
        "[IN:GET_SUNRISE when does the sun (rise|come up) in [SL:LOCATION {city} ] [SL:DATE_TIME {day} ] ]",
        "[IN:GET_WEATHER show me the [SL:WEATHER_ATTRIBUTE {weather} ] forecast near [SL:LOCATION {city} ] "
        "in [SL:WEATHER_TEMPERATURE_UNIT (celsius|fahrenheit) ] ]",
    ),
}

# Values in both splits
VALUES = {
    "time": "noon|midnight|7 am|8 am|half past nine|10 : 30|1 pm|quarter to three|4 : 45 pm|six o'clock|8 at night",
    "day": "today|tomorrow|tonight|on monday|on tuesday|on friday|this weekend|next week|on the 3rd of may|next friday",
    "number": "two|three|five|ten|15|20|30|45|90",
    "unit": "seconds|minutes|hours",
    "which": "first|second|third|last|next|latest",
    "kind": "concerts|parties|food festivals|art shows|farmers markets|theater plays|book fairs|free events",
    "genre": "jazz|rock|classical music|hip hop|country|blues|folk|techno|reggae|soul",
    "obstacle": "tolls|the highway|road works|ferries|the tunnel|heavy traffic|the old bridge",
    "weather": "rain|snow|hail|freeze|storm|drizzle|thunder",
}
# (values in the training split, values in the test split)
UNSEEN = {
    "name": (
        "amy|ben|carla|david|emma|frank|grace|henry|isabel|jack|kate|liam|maria|noah|olivia|peter|rachel|sam|tina|victor"
        "|my mom|my boss|uncle bob|aunt jane|doctor lee|the neighbors|my sister|mister brown",
        "quentin|yasmin|oscar|fiona|hugo|beatrice|grandpa|my roommate|professor diaz|the plumber",
    ),
    "city": (
        "boston|chicago|denver|seattle|austin|miami|dallas|portland|san diego|new orleans|paris|london|berlin|madrid"
        "|rome|tokyo|sydney|toronto|oslo|vienna|dublin|mexico city|prague|lisbon",
        "minneapolis|helsinki|nairobi|kansas|montreal|cape town|osaka|warsaw|buenos aires|tulsa",
    ),
    "adjective": (
        "golden|silent|broken|electric|lonely|crimson|endless|hidden|burning|frozen|gentle|wild",
        "paper|velvet|distant|hollow|scarlet|restless",
    ),
    "noun": (
        "rivers|hearts|shadows|dreams|mountains|mirrors|roses|engines|islands|summers|wolves|highways",
        "lanterns|sparrows|oceans|comets|orchards|tigers",
    ),
    "hobby": (
        "yoga|swimming|chess club|dinner|lunch|gym|band practice|haircut|staff meeting|tennis|choir|work|school"
        "|job interview|movie night|book club|bowling|piano lesson",
        "karate|breakfast|picnic|board review|pottery class|volleyball|dentist visit|poker",
    ),
    "task": (
        "water|buy|clean|return|pick up|check|order|pack|fix|wash|look for|bring|pay for|sort|collect",
        "paint|sell|inspect|unwrap|measure|feed",
    ),
    "object": (
        "plants|library books|car|dry cleaning|tickets|groceries|kitchen sink|suitcase|laundry|bike|passports|tent"
        "|birthday cake|printer|winter coats|pizza|soup|rice|tea|eggs",
        "fence|goldfish|curtains|guitar|ladder|invoices|lasagna|pumpkins|telescope|noodles",
    ),
    "news": (
        "i am running late|the meeting is over|dinner is ready|we are out of milk|the train was canceled"
        "|they can come on sunday|she found the keys|the movie starts soon|he needs a ride|we won the game",
        "the parcel has arrived|our flight got delayed|nobody fed the cat|the elevator is stuck|i passed my exam",
    ),
}
# Values composed of other values
PHRASES = {
    "when": "{day}|at {time}|{day} at {time}|in {number} {unit}",
    "length": "{number} {unit}|half an hour|{number} {unit} and {number} seconds",
    "song": "{adjective} {noun}|the {adjective} {noun}|{noun} and {noun}|{adjective} {noun} of {city}",
    "band": "the {adjective} {noun}|{name} and the {noun}|{adjective} {noun}",
    "todo": "{task} the {object}|{task} the {object} for {name}|{task} the {object} and the {object}",
    "thing": "{object}|{object} and {object}|{adjective} {object}",
    "text": "{news}|{news} and i have to {todo}|i will {todo} {day}|i left the {object} with {name}",
}


def _parse(rng: random.Random, split: Split) -> str:
    """Fill a random template."""

    def fill(match: re.Match) -> str:
        choices, name = match.groups()
        if choices is None:
            choices = UNSEEN[name][split == "test"] if name in UNSEEN else VALUES.get(name) or PHRASES[name]
        return rng.choice(choices.split("|"))

    text = rng.choice(rng.choice([*TEMPLATES.values()]))
    while (filled := re.sub(r"\((.*?)\)|\{(\w+)\}", fill, text)) != text:  # phrases contain further placeholders
        text = filled
    return " ".join(text.split())


@checked_arguments("prompts.")
def commands(
    count: Annotated[PositiveInt, Field(examples=[24])] = 24, split: Split = "test", seed: int = 0
) -> list[Example]:
    """Distinct commands as prompts, with their parses as references; the same on every machine.

    A smaller `count` gives a prefix of the same list. The split "test" has slot values that "train" never shows.
    """
    rng = random.Random(f"{split} {seed}")
    parses: dict[str, str] = {}  # by command
    while len(parses) < count:
        parse = _parse(rng, split)
        parses[" ".join(re.sub(r"\[\S+|\]", " ", parse).split())] = parse
    return [{"prompt": {"user": command}, "response": parse} for command, parse in parses.items()]


@checked_arguments("dataset.")
def command_dataset(
    tokenizer: Any,
    split: Split = "train",
    count: Annotated[PositiveInt, Field(examples=[40000])] = 40_000,
    seed: int = 0,
) -> ReplyDataset:
    """`commands` as conversations in the tokenizer's chat template; the loss counts the parses."""
    return ReplyDataset(tokenizer, commands(count, split, seed))
