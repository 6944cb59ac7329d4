"""Checkpoints are whole or not there: cut files are passed over, a full disk leaves the older one usable."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from needle.checkpoints import AtomicCheckpoints, newest_checkpoint, step_of
from needle.errors import DataError, UserError


def checkpoint(step: int, kib: int = 4) -> dict:
    return {"global_step": step, "state_dict": {"weight": torch.full((kib * 256,), float(step))}}


def save(folder: Path, step: int, kib: int = 4) -> Path:
    path = folder / f"step={step}.ckpt"
    AtomicCheckpoints().save_checkpoint(checkpoint(step, kib), path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for step in (8, 16, 100):
        save(tmp_path / "checkpoints", step)
    return tmp_path / "checkpoints"


def test_the_newest_is_the_one_of_the_highest_step_not_of_the_last_name(folder: Path):
    newest = newest_checkpoint(folder)
    assert newest == folder / "step=100.ckpt"
    assert sorted(path.name for path in folder.iterdir()) == ["step=100.ckpt", "step=16.ckpt", "step=8.ckpt"]
    loaded = AtomicCheckpoints().load_checkpoint(newest)
    assert loaded["global_step"] == 100
    assert torch.equal(loaded["state_dict"]["weight"], checkpoint(100)["state_dict"]["weight"])


@pytest.mark.parametrize(
    ("name", "step"), [("step=12.ckpt", 12), ("epoch=0-step=120.ckpt", 120), ("last.ckpt", -1), ("step=.ckpt", -1)]
)
def test_a_step_is_read_from_the_name(name: str, step: int):
    assert step_of(Path(name)) == step


@pytest.mark.parametrize("kept_frac", [0.0, 0.01, 0.5, 0.99])
def test_a_cut_checkpoint_is_passed_over_with_a_note(folder: Path, capsys: pytest.CaptureFixture, kept_frac: float):
    newest = folder / "step=100.ckpt"
    whole = newest.read_bytes()
    newest.write_bytes(whole[: int(len(whole) * kept_frac)])
    assert newest_checkpoint(folder) == folder / "step=16.ckpt"
    assert "damaged checkpoint" in (note := capsys.readouterr().err)
    assert "step=100.ckpt" in note


def test_a_file_that_is_something_else_is_passed_over(folder: Path):
    (folder / "step=200.ckpt").write_text("not a checkpoint")
    assert newest_checkpoint(folder) == folder / "step=100.ckpt"


def test_what_a_kill_left_half_written_is_no_checkpoint(folder: Path):
    (folder / "step=200.ckpt.part").write_bytes((folder / "step=100.ckpt").read_bytes()[:100])
    assert newest_checkpoint(folder) == folder / "step=100.ckpt"


def test_with_no_whole_checkpoint_the_run_cannot_be_continued(folder: Path, tmp_path: Path):
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(DataError, match="no usable checkpoint"):
        newest_checkpoint(folder)
    assert newest_checkpoint(folder, required=False) is None
    with pytest.raises(DataError, match="no usable checkpoint"):
        newest_checkpoint(tmp_path / "nowhere")


def test_a_checkpoint_that_cannot_be_written_leaves_the_older_of_its_name_whole(folder: Path):
    """Something that no pickle holds, in place of a failure in the middle of writing."""
    unwritable = {**checkpoint(100), "hook": lambda: None}
    with pytest.raises(Exception, match="pickle"):
        AtomicCheckpoints().save_checkpoint(unwritable, folder / "step=100.ckpt")
    assert not list(folder.glob("*.part"))
    assert AtomicCheckpoints().load_checkpoint(folder / "step=100.ckpt")["global_step"] == 100


def test_a_checkpoint_takes_the_place_of_its_namesake_in_one_step(folder: Path):
    """Whoever has the older one open goes on reading the older one whole."""
    path = folder / "step=100.ckpt"
    with path.open("rb") as older:
        AtomicCheckpoints().save_checkpoint(checkpoint(7), path)
        assert torch.load(older, weights_only=True)["global_step"] == 100
    assert AtomicCheckpoints().load_checkpoint(path)["global_step"] == 7


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 2 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    try:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    if mounted.returncode:
        pytest.skip(f"mounting a tmpfs is not permitted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_says_so_and_leaves_the_older_checkpoint_whole(small_disk: Path):
    run = small_disk / "run"
    older = save(run / "checkpoints", 8, kib=512)
    with pytest.raises(UserError) as caught:
        save(run / "checkpoints", 16, kib=4096)
    message = str(caught.value)
    assert "disk is full" in message
    assert "1 MiB free" in message
    assert str(older) in message
    assert f"resume={run}" in message
    assert list((run / "checkpoints").iterdir()) == [older]
    assert newest_checkpoint(run / "checkpoints") == older
    assert AtomicCheckpoints().load_checkpoint(older)["global_step"] == 8
    # And there is room again for one that fits.
    assert newest_checkpoint(save(run / "checkpoints", 24, kib=512).parent) == run / "checkpoints" / "step=24.ckpt"


def test_a_disk_that_is_full_from_the_start_says_that_there_is_no_older_checkpoint(small_disk: Path):
    with pytest.raises(UserError, match="no older checkpoint"):
        save(small_disk / "run" / "checkpoints", 8, kib=4096)
    assert list((small_disk / "run" / "checkpoints").iterdir()) == []
