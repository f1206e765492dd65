"""Twenty ratings through a running server, and what they change; see docs/own-tools.md.

python docs/ratings.py http://127.0.0.1:8080 PROVIDER [USER]

Two providers, orchard and quillpad, offer the same eight functions. The user likes the calls that go to PROVIDER, and
says so twenty times. Counted is how many of twelve other requests go there, without the memory and, after the ratings,
with it. Without a USER only the first is done.
"""

import json
import sys
import urllib.request

PROVIDERS = "orchard", "quillpad"
FUNCTIONS = {
    "find_recipe": (
        "Recipes with an ingredient",
        "ingredient",
        "Find a recipe with {}.",
        "leeks figs oats plums basil",
    ),
    "get_forecast": (
        "Weather forecast of a city",
        "city",
        "What will the weather be in {}?",
        "Oslo Lima Bern Kyiv Graz",
    ),
    "find_books": ("Books on a topic", "topic", "Which books are there on {}?", "tides moss chess looms opera"),
    "get_exchange_rate": ("Exchange rate of a currency", "currency", "What is {} worth?", "EUR CHF SEK JPY PLN"),
    "find_trains": ("Trains to a place", "place", "Is there a train to {}?", "Ghent Turin Porto Lyon Split"),
    "get_word_meaning": ("Meaning of a word", "word", "What does {} mean?", "moot ersatz quaint limpid terse"),
    "find_museums": ("Museums of a city", "city", "Name museums in {}.", "Delft Basel Riga Cork Sofia"),
    "get_air_quality": (
        "Air quality of a city",
        "city",
        "How clean is the air in {}?",
        "Milan Cairo Nancy Varna Leeds",
    ),
}


def tools(name: str) -> list[dict]:
    """The two tools of one function."""
    text, parameter, _, _ = FUNCTIONS[name]
    schema = {"type": "object", "properties": {parameter: {"type": "string"}}, "required": [parameter]}
    return [
        {"type": "function", "function": {"name": f"{provider}.{name}", "description": text, "parameters": schema}}
        for provider in sorted(PROVIDERS, reverse=list(FUNCTIONS).index(name) % 2 == 0)
    ]


def post(url: str, path: str, body: dict) -> dict:
    """The server's answer."""
    request = urllib.request.Request(f"{url}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def chosen(url: str, name: str, word: str, **more: object) -> tuple[str, str]:
    """The id of a reply, and the provider that it calls."""
    messages = [{"role": "user", "content": FUNCTIONS[name][2].format(word)}]
    body = {"messages": messages, "tools": tools(name), "tool_choice": "required", "max_tokens": 64}
    answer = post(url, "/v1/chat/completions", body | more)
    return answer["id"], answer["choices"][0]["message"]["tool_calls"][0]["function"]["name"].partition(".")[0]


def count(url: str, liked: str, **more: object) -> str:
    """How many of twelve requests that nobody rates go to the liked provider."""
    asked = [(name, word) for name in list(FUNCTIONS)[:6] for word in FUNCTIONS[name][3].split()[3:]]
    went = sum(chosen(url, name, word, **more)[1] == liked for name, word in asked)
    return f"{went} of {len(asked)}"


def main(url: str, liked: str, user: str = "") -> None:
    """Rate, and count."""
    print(f"to {liked} without the memory: {count(url, liked)}", flush=True)
    if not user:
        return
    asked = [(name, FUNCTIONS[name][3].split()[number]) for number in range(3) for name in FUNCTIONS]
    verdicts = []
    for name, word in asked[:20]:
        identity, provider = chosen(url, name, word, user=user)
        verdicts.append("liked" if provider == liked else "disliked")
        post(url, "/v1/feedback", {"id": identity, "verdict": verdicts[-1], "user": user})
    print(f"rated: {verdicts.count('liked')} liked, {verdicts.count('disliked')} disliked", flush=True)
    print(f"to {liked} with it: {count(url, liked, user=user)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
