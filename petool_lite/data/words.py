"""Words that simulated users and their tools are made of, and how names are split into words."""

import re

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
_SAID = """
Thank you so much.|Okay, great.|Hi, how is it going?|You made my day.|Let's stop here for now.|I am a bit sad today.
What do you think about cats?|Who was the first person on the moon?|How do bees make honey?|Write a haiku about snow.
Why do leaves fall in autumn?|What does serendipity mean?|How many legs does a spider have?|Give me a compliment.
What's the difference between a frog and a toad?|Make up a short fairy tale.|Which ocean is the largest?|Good night!
Can you keep a secret?|Explain gravity to a child.|Are you a human?|I changed my mind, forget it.|Hm, let me think.
Who wrote Don Quixote?|Tell me something funny.|What should I call my new dog?|Sorry, wrong window.|That is wrong.
Say hello in Finnish.|How old is the universe?|Cheer me up.|Is a tomato a fruit?|What can you do?|Nice to meet you.
Summarize the plot of Hamlet.|Why is the sea salty?|Sing me a song.|No, thanks.|Give me a riddle.|Do you dream?
"""
SMALL_TALK = tuple(line for row in _SAID.split("\n") for line in row.split("|") if line)


def split_name(name: str) -> list[str]:
    """The lower-case words of what a tool or a parameter is called, in their order."""
    api = name.split(">.<")[-1].rstrip(">") if name.startswith("<") else re.split(r"__|[./]", name)[-1]
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+|[^\W\d_a-zA-Z]+", api)
    return [word.lower() for word in words] or ["tool"]
