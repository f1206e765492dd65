"""Whether an entry's answer is what its compact prompt suggests: the likely tool, and the values stated for it."""

from petool_lite.data.entries import Entry
from petool_lite.data.jobs import likeliest
from petool_lite.data.values import drafted


def follows(entry: Entry, setting: str) -> bool:
    """Whether `likeliest` comes to the answer, and `drafted` to its parameters, but for required ones it lacks."""
    return entry.gold is None or _agrees(entry, setting) == (True, True)


def untold(entry: Entry, setting: str) -> bool:
    """Whether the likely tool is right and its values are others than request and declaration tell.

    Nothing in such a prompt says what they are: a model can learn them by heart only, and learns with them that stated
    values may be left.
    """
    return entry.gold is not None and _agrees(entry, setting) == (True, False)


def _agrees(entry: Entry, setting: str) -> tuple[bool, bool]:
    """Whether the likely tool is the right one, and the values that the query states for it are."""
    assert entry.gold is not None
    tool, right = likeliest(entry.prompt(setting), entry.query, setting), entry.gold.parameters
    stated = drafted(tool, entry.query)
    wrong = any(name not in right or right[name] != value for name, value in stated.items())
    missing = right.keys() - stated.keys() - {item.name for item in tool.required}
    return tool.name == entry.gold.tool_name, not wrong and not missing
