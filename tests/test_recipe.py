"""Recipes are strict, complete and read by the code."""

import re
from pathlib import Path

import pytest

from petool_lite.errors import PetoolError
from petool_lite.recipe import Recipe, builtin_recipes, flat, load_recipe, settings, to_toml

LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
NUMBERS = [name for name, kind, *_ in settings() if kind is float]
CODE = Path(__file__).parent.parent


@pytest.mark.parametrize("name", builtin_recipes())
def test_every_shipped_recipe_loads_and_survives_a_round_trip(name, tmp_path) -> None:
    _, recipe = load_recipe(name)
    (tmp_path / "copy.toml").write_text(to_toml(recipe))
    assert load_recipe(str(tmp_path / "copy.toml"))[1] == recipe
    assert recipe.data.one_setting == recipe.data.setting.replace("all", "rating")


def test_rating_is_the_published_recipe() -> None:
    _, recipe = load_recipe("recipes/rating.toml")
    wanted = {
        "model.base": "meta-llama/Llama-3.2-3B-Instruct", "model.precision": "nf4", "model.max_tokens": 8192,
        "lora.r": 32, "lora.alpha": 64, "lora.dropout": 0.1, "lora.targets": [f"{name}_proj" for name in LINEARS],
        "train.epochs": 2, "train.learning_rate": 1e-4, "train.schedule": "cosine", "train.warmup_ratio": 0.01,
        "train.rows": 32, "train.optimizer": "paged_adamw_32bit", "train.weight_decay": 0.001, "train.clip_norm": 0.3,
    }  # fmt: skip
    assert flat(recipe) == flat(recipe) | wanted


def test_all_problems_are_reported_together_and_an_empty_file_is_no_recipe(tmp_path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text('stray = 1\n[train]\nlearning_rat = 1\nepochs = "two"\n[lora]\nr = 0\n[model]\nprecision = "x"')
    told = ("stray", "did you mean train.learning_rate", "train.epochs", "lora.r", "precision: 'x' is not one of")
    apart = ("train.epochs: ", "model.precision: full trains the weights", "model.adapter: ", "train.objective: ")
    other = ["model.precision=nf4", "model.adapter=runs/a", "train.objective=dpo"]
    load_recipe("demo", other)  # each of them goes with an adapter, as far as a recipe can tell
    pairs = ("train.token_budget: dpo takes one pair", "train.memory: dpo takes one pair")
    for name, given, parts in (
        (str(path), [], told),
        ("demo", ["train.method=full", "train.epochs=-1", *other], apart),
        ("dpo", ["train.token_budget=4096", "train.memory=auto"], pairs),
    ):
        with pytest.raises(PetoolError) as error:
            load_recipe(name, given)
        assert not [part for part in parts if part not in error.value.message]
    old = '[data]\nstyle = "compact"\n'
    for text, said in (("# nothing yet\n", r"bad\.toml is empty"), (old, r"bad\.toml is of petool-lite 0\.1")):
        path.write_text(text)
        with pytest.raises(PetoolError, match=said):
            load_recipe(str(path))


def test_a_value_beyond_its_bound_is_refused() -> None:
    for override, problem in (
        ("train.warmup_ratio=1.01", "train.warmup_ratio: 1.01 is greater than the maximum of 1"),
        ("train.seed=4294967296", "train.seed: 4294967296 is greater than the maximum of 4294967295"),
        ("train.epochs=0", "train.epochs: 0 passes"),
        ("train.learning_rate=0", "train.learning_rate: a rate of 0"),
        ("lora.targets=['qproj']", "lora.targets: 'qproj' is not one of ['q_proj'"),
        ("train.batch_size=4", "unknown key train.batch_size"),
        ("train.lr=1", "unknown key train.lr; did you mean train.learning_rate?"),
        ("train.epochs=1" + "0" * 400, "train.epochs: expected a finite number of at most 64 bits"),
        *((f"{name}=-inf", f"{name}: expected a finite number") for name in NUMBERS),
        ("lora.targets=[0x" + "F" * 9000 + "]", "lora.targets: a number without end"),
    ):
        with pytest.raises(PetoolError, match=re.escape(problem)):
            load_recipe("demo", [override])


def test_every_setting_is_read_and_has_a_meaning_there_are_few_and_the_command_line_beats_the_file() -> None:
    files = [*CODE.glob("petool_lite/**/*.py"), *CODE.glob("export/*.py"), *CODE.glob("bench/*.py")]
    code = "\n".join(file.read_text() for file in files if file.name != "recipe.py")
    code = code.replace("settings = recipe.train", "")
    for name, *_ in settings():
        key = name.split(".")[1]
        assert re.search(rf"(recipe\.\w+|settings|data|lora)\.{key}\b", code), f"no code reads {name}"
    assert len(list(settings())) <= 35
    assert all(about["doc"] for _, _, about, _ in settings())
    assert load_recipe("demo")[1] != Recipe()
    _, recipe = load_recipe("demo", ["train.epochs=3", "data.train=some/file.json", "lora.targets=['q_proj']"])
    assert (recipe.train.epochs, recipe.data.train, recipe.lora.targets) == (3.0, "some/file.json", ["q_proj"])
