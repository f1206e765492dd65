"""What a study by folds trains and scores, and what its folder keeps of that, so that no other runs get in."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petool_lite.data.files import source_sha256
from petool_lite.errors import PetoolError
from petool_lite.recipe import flat, load_recipe
from petool_lite.runs import write_json


@dataclass(frozen=True)
class Change:
    """The recipe with some settings changed, under a name."""

    label: str
    settings: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        """The label as the names of its runs' folders have it."""
        return "".join(letter if letter.isalnum() else "-" for letter in self.label)


@dataclass(frozen=True)
class Study:
    """What is trained and scored where; `settings` go to every run, `scored` are the prompts it is scored in.

    Whether there is a `gpu` is asked once, before CUDA's multi-process service starts: who asks later is its client.
    """

    data: str
    recipe: str
    out: Path
    changes: tuple[Change, ...]
    folds: int
    only: tuple[int, ...]
    seeds: tuple[int, ...]
    settings: tuple[str, ...]
    scored: tuple[str, ...]
    export: str
    jobs: int
    until: float
    gpu: bool

    def runs(self, change: "Change") -> "list[One]":
        """The runs of a change: every seed on every fold."""
        return [One(change, seed, fold) for seed in self.seeds for fold in self.only]


@dataclass(frozen=True)
class One:
    """One run of a study: a change, a seed and a fold."""

    change: Change
    seed: int
    fold: int

    def folder(self, study: Study) -> Path:
        """Where its run and its results lie."""
        return study.out / f"{self.change.folder}-seed{self.seed}-fold{self.fold}"


def parse_change(text: str) -> Change:
    """A change from `LABEL: KEY=VALUE KEY=VALUE`."""
    label, colon, rest = text.partition(":")
    settings = tuple(rest.split())
    if not colon or not settings or not all("=" in item for item in settings):
        raise PetoolError(f"--change {text}: expected LABEL: KEY=VALUE", 'such as --change "r 16: lora.r=16"')
    return Change(label.strip(), settings)


def fold_file(study: Study, fold: int, name: str) -> Path:
    """Where the entries of a fold lie; `name` is train or test."""
    return study.out / "folds" / f"fold{fold}-{name}.jsonl"


def settings_of(study: Study, one: One) -> list[str]:
    """The settings of one run, a later one of the same key deciding."""
    own = [f"data.train={fold_file(study, one.fold, 'train')}", f"train.seed={one.seed}"]
    given = [*study.settings, *one.change.settings]
    return own + [item.replace("{fold}", str(one.fold)).replace("{seed}", str(one.seed)) for item in given]


def keep_study(study: Study) -> None:
    """Keep in study.json what every run of the folder shares, and each change by its label.

    Raises PetoolError where runs of something else lie there: a run is known by the name of its folder alone. Changes,
    seeds, folds of `only`, prompts and an export may come later.
    """
    path, now = study.out / "study.json", _shared(study)
    kept: dict[str, Any] = {"shared": now, "changes": {}}
    if path.is_file() and _made(study, "*"):
        kept = json.loads(path.read_text())
    elif _made(study, "*"):
        raise PetoolError(f"{study.out} has runs but no study.json: nobody can tell what made them", _ELSEWHERE)
    old = kept["shared"]
    wrong = [f"{key} was {old.get(key)}, is {now.get(key)}" for key in old | now if old.get(key) != now.get(key)]
    if wrong:
        told = "; ".join([*wrong[:3], f"{len(wrong) - 3} more"] if len(wrong) > 4 else wrong)
        raise PetoolError(f"{study.out} has runs of another study: {told}", _ELSEWHERE)
    before = (Change(label, tuple(settings)) for label, settings in kept["changes"].items())
    changes = [*(change for change in before if _made(study, change.folder)), *study.changes]
    _check_folders(changes)
    write_json(path, {"shared": now, "changes": {change.label: change.settings for change in changes}})


def _made(study: Study, name: str) -> bool:
    """Whether a run or results lie in the folders of a change; a log alone, of what failed, is neither."""
    return any(study.out.glob(f"{name}-seed*-fold*/*/*"))


_ELSEWHERE = "choose another --out"


def _shared(study: Study) -> dict[str, Any]:
    """The recipe's settings before any change, the entries and the number of folds."""
    settings = flat(load_recipe(study.recipe, study.settings)[1])
    return {"folds": study.folds, "sha256 of DATA": source_sha256(study.data)[:16], **settings}


def _check_folders(changes: Iterable[Change]) -> None:
    """Refuse two changes whose runs would lie in the same folders."""
    first: dict[str, Change] = {}
    for change in changes:
        other = first.setdefault(change.folder, change)
        if other != change:
            both = " and ".join(f'"{item.label}" ({" ".join(item.settings)})' for item in (other, change))
            raise PetoolError(f"the changes {both} have the same folder", "give one of them another label")
