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
    """TensorBoard's own file holds the losses of metrics.jsonl."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in (trained / "tensorboard").glob("events*"):
        raw = path.read_bytes()
        position = 0
        while position < len(raw):  # records: length, its checksum, the event, its checksum
            length = int.from_bytes(raw[position : position + 8], "little")
            event = Event.FromString(raw[position + 12 : position + 12 + length])
            for value in event.summary.value:
                if value.tag == "train/loss":
                    found[event.step] = value.simple_value
            position += length + 16
    assert found == pytest.approx({row["step"]: row["loss"] for row in rows_of(trained)}, rel=1e-6)


def test_an_absent_tracker_is_refused_before_anything_is_loaded(command, tmp_path) -> None:
    result = command("train", "demo", "--dry-run", "--set", "train.report_to=tensorboard,clearml", cwd=tmp_path)
    assert (result.returncode, "clearml is not installed" in result.stderr) == (1, True), result.stderr
    with pytest.raises(PetoolError, match="unknown tracker tensorbord"):
        check_reporters("tensorbord")
    assert check_reporters("") == []


def test_rows_after_the_checkpoint_are_cut_in_words(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    said = []
    assert cut_after(path, 2, lambda text, *_: said.append(text)) == [{"step": 1}, {"step": 2}]
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert said == ["metrics.jsonl: 2 lines after step 2 cut, they come again"]
    assert cut_after(path, 5, lambda text, *_: said.append(text)) == [{"step": 1}, {"step": 2}]
    assert len(said) == 1
