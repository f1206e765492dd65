"""Words that simulated users and their tools are made of, and how names are split into words."""

import re
from random import Random

from petool_lite.data.entries import api_name

FIRST = """
Amber Apex Atlas Aqua Bright Cedar Clear Cobalt Coral Delta Echo Ember Falcon Fern Global Harbor Helio Iris Juniper
Kestrel Lark Lumen Maple Meridian Nimbus North Nova Onyx Orbit Pebble Pine Pixel Prime Pulse Quartz Quill Rapid Raven
River Sable Sigma Solar Swift Terra Tidal True Umbra Vale Vertex Wave Willow Zen
"""
LAST = "Api Base Cloud Connect Data Desk Engine Feed Gate Hub Info Kit Labs Link Plus Point Pro Service Works"
AREAS = """
Books Business Data Events Finance Food Health Jobs Location Mail Media Music News Science Search Shopping Social
Sports Tools Travel Weather
"""
SAME = (
    "get fetch retrieve read show", "search find query lookup", "list enumerate all", "create add make new",
    "delete remove drop", "update edit change modify", "calculate compute work_out", "convert translate turn",
    "send post submit", "check verify validate", "book reserve", "buy order purchase", "play start",
)  # fmt: skip
SYNONYMS = {word: tuple(words.split()) for words in SAME for word in words.split()}
# What is said to an assistant and no tool is for: talk, and what a language model answers by itself.
_TALK = """
Okay, great.|Hi, how is it going?|You made my day.|Let's stop here for now.|I am a bit sad today.
Can you keep a secret?|Are you a human?|I changed my mind, forget it.|Hm, let me think.|Sorry, wrong window.|Good night!
Say hello in Finnish.|Cheer me up.|What can you do?|Nice to meet you.|No, thanks.|Never mind.|That is wrong.
Yes, please.|Great job!|I'm bored.|What is your name?|Good morning!|I don't get it.
"""
_WONDERED = """
What do you think about {}?|Write a haiku about {}.|Make up a short tale of {}.
Why do people like {}?|Explain {} to a child.|What is special about {}?|Give me a riddle on {}.|Who invented {}?
Where does the word for {} come from?|How does one draw {}?|What rhymes with {}?|Write four lines in praise of {}.
How would you describe {}?|Is it true that {} bring luck?|I dreamed of {} last night.|What was the first book about {}?
Let's talk about {}.|Sing something about {}.|Which is older, the moon or {}?|What did the Romans know of {}?
"""
_THINGS = """
cats bees bread snow rivers bicycles clocks frogs gravity chess pianos volcanoes honey castles whales dragons bridges
glass pirates robots tea sheep rainbows mirrors onions storms kites lighthouses salt dinosaurs paper violins deserts
owls chocolate trains comets mushrooms gloves elephants poetry shadows tulips coins ants cheese windmills ghosts maps
"""


def small_talk(rng: Random) -> str:
    """Something that a user says and no tool is for."""
    if rng.random() < 0.3:
        return rng.choice(_lines(_TALK))
    return rng.choice(_lines(_WONDERED)).format(rng.choice(_THINGS.split()))


def _lines(text: str) -> list[str]:
    return [line for row in text.split("\n") for line in row.split("|") if line]


def split_name(name: str) -> list[str]:
    """The lower-case words of what a tool or a parameter is called, in their order."""
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+|[^\W\d_a-zA-Z]+", api_name(name))
    return [word.lower() for word in words] or ["tool"]
