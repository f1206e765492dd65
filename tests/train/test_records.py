"""What a run leaves to read."""

import pytest
from support import rows_of

from petool_lite.errors import PetoolError
from petool_lite.train.records import check_reporters, cut_after


def test_the_picture_shows_both_curves(trained) -> None:
    from PIL import Image

    with Image.open(trained / "loss.png") as picture:
        picture.load()
        assert picture.format == "PNG"
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}
    assert (31, 119, 180) in colours  # the loss
    assert (127, 127, 127) in colours  # the learning rate


def test_a_tracker_hears_every_step(trained) -> None:
    (path,) = (trained / "tensorboard").glob("events*")
    assert path.read_bytes().count(b"train/loss") == len(rows_of(trained)) == 10


def test_an_absent_tracker_is_refused_before_anything_is_loaded(command, tmp_path) -> None:
    result = command("train", "demo", "--dry-run", "--set", "train.report_to=tensorboard,clearml", cwd=tmp_path)
    assert (result.returncode, "clearml is not installed" in result.stderr) == (1, True), result.stderr
    with pytest.raises(PetoolError, match="unknown tracker tensorbord"):
        check_reporters("tensorbord")
    assert check_reporters("") == []


def test_rows_after_the_checkpoint_are_cut_in_words(tmp_path) -> None:
    path, said = tmp_path / "metrics.jsonl", []
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    for step in (2, 5):
        assert cut_after(path, step, lambda text, *_: said.append(text)) == [{"step": 1}, {"step": 2}]
        assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert said == ["metrics.jsonl: 2 lines after step 2 cut, they come again"]
