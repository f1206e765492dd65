"""Everything that is checked and counted before a model is loaded."""

from petool_lite.base import Base, resolve_base
from petool_lite.console import Report, facts_text, silent
from petool_lite.errors import MACHINE, PetoolError
from petool_lite.prepare import Prepared, prepare
from petool_lite.prompt import Chat, chat_from_directory
from petool_lite.recipe import Recipe, builtin_recipes, load_recipe
from petool_lite.train.evaluation import check_exam
from petool_lite.train.records import check_reporters
from petool_lite.train.start import check_start


def plan(recipe: Recipe, report: Report = silent) -> tuple[Base, Chat, Prepared]:
    """Base, chat and rows of a recipe, counted and told; no model is loaded."""
    check_machine(recipe)
    check_reporters(recipe.train.report_to)
    check_exam(recipe)
    check_start(recipe, report)
    base = resolve_base(recipe.model.base, lambda text: report(text, 0, 0, ""))
    chat = chat_from_directory(base.directory)
    prepared = prepare(recipe, base, chat, report)
    prepared.summary["steps"] = steps(recipe, prepared.summary["kept"])
    report(facts_text("training rows", prepared.summary), 0, 0, "")
    if prepared.left_out:
        names = ", ".join(prepared.left_out[:5]) + (", ..." if len(prepared.left_out) > 5 else "")
        why = f"more than {recipe.model.max_tokens} tokens"
        if recipe.data.overlength == "trim-history":
            why += " even without history (tools and answers are never cut)"
        report(f"left out, {why}: entries {names}", 0, 0, "")
    return base, chat, prepared


def steps(recipe: Recipe, rows: int) -> int:
    """Optimizer steps of the whole run."""
    if recipe.train.max_steps:
        return recipe.train.max_steps
    return max(1, int(-(-rows // (recipe.train.batch_size * recipe.train.accumulate)) * recipe.train.epochs))


def rows_a_device(recipe: Recipe, devices: int) -> int:
    """Rows of an update that each of `devices` takes; raises PetoolError where they cannot share them evenly."""
    rows = recipe.train.batch_size * recipe.train.accumulate
    if rows % devices:
        raise PetoolError(
            f"{rows} rows an update cannot be shared by {devices} devices",
            "choose train.batch_size x train.accumulate as a multiple of the devices",
        )
    return rows // devices


def token_budget(recipe: Recipe) -> int:
    """Tokens a micro-step. A GPU needs many to be worth its kernel launches; a CPU only wastes masked attention."""
    import torch

    return recipe.train.token_budget or (16384 if torch.cuda.is_available() else 2048)


def check_machine(recipe: Recipe) -> None:
    """Refuse a recipe that this machine cannot run, before anything is loaded."""
    import torch

    if _needs_gpu(recipe) and not torch.cuda.is_available():
        here = [name for name in builtin_recipes() if not _needs_gpu(load_recipe(name)[1])]
        raise PetoolError(
            f"this recipe needs a GPU (for its optimizer {recipe.train.optimizer}), and torch finds none",
            f"rent one, or run here: petool-lite train {' or '.join(here)}; a small base trains here, slowly, with "
            "--set train.optimizer=adamw_torch",
            MACHINE,
        )


def _needs_gpu(recipe: Recipe) -> bool:
    return recipe.train.optimizer.startswith("paged")
