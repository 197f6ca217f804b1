"""Clips and pictures that a tokenizer trains on: pure functions of the step, shared by processes, never test material."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from small_training import MODEL, losses_of, small, stopped_after

from lumos.data.synthetic.sampling import SyntheticScenes
from lumos.errors import RunError, UserError
from lumos.training.loop import Run
from lumos.training.tokenizer.clips import (
    PACKAGE_FILMS,
    TrainingClips,
    films,
    held_out_photographs,
    held_out_worlds,
    photographs,
    to_video,
)
from lumos.training.tokenizer.task import foreground_weight, train
from lumos.video.io import write_video


@pytest.mark.parametrize("weight", [13, 13.0])
def test_foreground_pixels_have_the_set_weight(weight):
    video = torch.full((2, 3, 1, 8, 8), -0.5)
    video[:, :, :, 2:4, 2:4] = 0.5
    weights = foreground_weight(video, torch.tensor([True, False]), weight)
    inside, outside = weights[0, 0, 0, 2, 2], weights[0, 0, 0, 0, 0]
    assert inside / outside == pytest.approx(13)
    assert weights.mean(dim=(1, 2, 3, 4)).tolist() == pytest.approx([1, 1])
    assert (weights[1] == 1).all()


def test_a_gradient_is_no_foreground():
    video = torch.linspace(-1, 1, 8)[:, None].expand(1, 3, 2, 8, 8).clone()
    video[..., 3, 2:4] += 0.4
    weights = foreground_weight(video, torch.tensor([True]), 13)
    assert (weights > weights.min()).sum() == 2 * 2
    assert weights.max() / weights.min() == pytest.approx(13)


def clips_of(**changes) -> TrainingClips:
    options = {
        "seed": 0,
        "height": 16,
        "width": 24,
        "num_frames": 5,
        "batch_size": 4,
        "pictures_per_batch": 3,
        "share_worlds": 0.5,
        "film_sources": [],
    }
    return TrainingClips(**(options | changes))


def test_batches_are_a_pure_function_of_the_step():
    clips = clips_of()
    later = clips.batch(7)
    again = clips_of().batch(7)
    assert later.clips.shape == (4, 5, 16, 24, 3)
    assert later.pictures.shape == (3, 1, 16, 24, 3)
    assert later.step == again.step == 7
    assert all(torch.equal(value, vars(again)[name]) for name, value in vars(later).items() if name != "step")
    assert not torch.equal(later.clips, clips.batch(8).clips)
    (videos, worlds), (pictures, _) = later.videos("cpu")
    assert torch.equal(videos, to_video(later.clips.numpy()))
    assert torch.equal(worlds, later.clip_is_world)
    assert pictures.shape == (3, 3, 1, 16, 24)
    assert -1 <= videos.min() < videos.max() <= 1


@pytest.mark.parametrize("world", [2, 3, 7])
def test_processes_share_a_step(world):
    """The clips of both processes, taken in turn, are those of one process."""
    clips = clips_of(share_textures=0.5, recolour=True)
    whole = clips.batch(5)
    parts = [clips.batch(5, range(rank, 7, world)) for rank in range(world)]
    positions = [position for rank in range(world) for position in range(rank, 7, world)]
    for name in ("clips", "clip_is_world", "pictures", "picture_is_world"):
        first, count = (0, 4) if name.startswith("clip") else (4, 3)
        order = [position - first for position in positions if first <= position < first + count]
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name)[order]), name


def test_scenes_and_real_material_are_mixed_as_told():
    clips = clips_of()
    flags = torch.cat([clips.batch(step).clip_is_world for step in range(20)])
    assert 20 <= flags.sum() <= 60
    assert clips_of(share_worlds=1.0).batch(0).clip_is_world.all()
    only_real = clips_of(share_worlds=0.0)
    assert not only_real.batch(0).clip_is_world.any()
    assert only_real.real_names
    moves = [(clip[0].float() - clip[-1]).abs().mean() for clip in only_real.batch(0).clips]
    assert min(moves) > 0


def test_sprites_are_trained_on_where_asked():
    options = {"kinds": ["sprites"], "share_two": 1.0}
    batch = clips_of(share_worlds=1.0, world_options=options).batch(2)
    worlds = SyntheticScenes(seed=0, num_frames=5, height=16, width=24, **options)
    for slot in range(4):
        assert np.array_equal(batch.clips[slot], worlds[2 * (4 + 3) + slot][0])
    held_out = held_out_worlds(2, 5, 16, 24, **options)
    assert torch.equal(held_out[1], to_video([replace(worlds, seed=10_007, split="held_out")[1][0]])[0])


@pytest.mark.slow
def test_a_run_with_sprites_goes_on_with_the_same_worlds_only(tmp_path):
    changes = {"worlds": {"kinds": ["sprites"]}, "steps": 2}
    assert train(small(tmp_path, **changes))["export"]
    record = json.loads((tmp_path / "video_tokenizer" / "training.json").read_text())
    assert record["settings"]["worlds"] == {"kinds": ["sprites"]}
    assert train(small(tmp_path, **changes))["steps"] == 2
    with pytest.raises(UserError, match=r"worlds was \{'kinds': \['sprites'\]\}, now \{\}"):
        train(small(tmp_path, steps=2))


def test_missing_pictures_end_the_run_before_it_begins(no_sprite_pictures, tmp_path):
    with pytest.raises(UserError, match="LUMOS_SPRITES names this folder: unset it"):
        train(small(tmp_path / "run", worlds={"kinds": ["sprites"]}))
    assert not (tmp_path / "run").exists()


def test_test_material_is_never_trained_on(tmp_path):
    for name in ("carphone_pristine.mp4", "street.mp4"):
        write_video(tmp_path / name, np.random.default_rng(0).integers(0, 255, (6, 48, 64, 3), np.uint8), fps=8)
    assert [path.name for path in films([str(tmp_path)])] == ["street.mp4"]
    assert [path.name for path in films([str(tmp_path)], held_out=True)] == ["carphone_pristine.mp4"]
    names = clips_of(film_sources=[str(tmp_path)]).real_names
    assert "street.mp4" in names
    assert not {"astronaut.png", "coffee.png", "china.jpg", "carphone_pristine.mp4"} & set(names)
    assert {path.name for path in photographs(held_out=True)}.isdisjoint(path.name for path in photographs())
    with pytest.raises(UserError, match=r"'nowhere\.mp4' does not exist"):
        films(["nowhere.mp4"])


def test_own_files_with_names_of_test_files_are_said(tmp_path, caplog):
    Image.new("RGB", (32, 32)).save(tmp_path / "coffee.png")
    write_video(tmp_path / "carphone.mp4", np.zeros((6, 48, 64, 3), np.uint8), fps=8)
    with caplog.at_level("WARNING", "lumos"):
        assert not {"coffee.png", "carphone.mp4"} & {path.name for path in photographs(sources=[str(tmp_path)])}
        assert films([str(tmp_path)]) == []
    said = [record.getMessage() for record in caplog.records]
    assert [name for name in ("coffee.png", "carphone.mp4") if any(f"the first: {tmp_path / name}." in text for text in said)] == [
        "coffee.png", "carphone.mp4",
    ]  # fmt: skip
    caplog.clear()
    films([PACKAGE_FILMS])
    assert not caplog.records, "the films of the package are left out as planned"


def test_held_out_photographs_fill_the_size():
    pictures = held_out_photographs(16, 24)
    assert pictures.shape == (3, 3, 1, 16, 24)
    assert pictures.std(dim=(1, 2, 3, 4)).min() > 0.1


def test_films_shorter_than_a_clip_are_left_out(tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "one.gif")
    clips = clips_of(film_sources=[str(tmp_path)])
    assert clips.films == []
    assert "one.gif" not in clips.real_names


@pytest.mark.slow
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="the system cannot fork")
def test_processes_draw_what_the_run_itself_would(tmp_path, monkeypatch):
    """The same holds after a signal to all processes."""
    changes = {"model": MODEL | {"dropout": 0.1}, "share_textures": 0.5, "recolour": True, "share_worlds": 0.5}
    train(small(tmp_path / "itself", **changes))
    report = Run._report

    def signal_in_step_two(self):
        report(self)
        if self.step == 2:
            for process in (*multiprocessing.active_children(), multiprocessing.current_process()):
                os.kill(process.pid, signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_report", signal_in_step_two)
        assert stopped_after(train(small(tmp_path / "drawn", processes=2, **changes))) == 3
    assert not multiprocessing.active_children()
    train(small(tmp_path / "drawn", processes=1, **changes))
    assert losses_of(tmp_path / "itself") == losses_of(tmp_path / "drawn")
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_killed_process_ends_the_run(tmp_path, monkeypatch):
    report = Run._report

    def kill(self):
        report(self)
        for process in multiprocessing.active_children()[:1]:
            process.kill()

    monkeypatch.setattr(Run, "_report", kill)
    with pytest.raises(RunError, match="a process that makes batches ahead was killed"):
        train(small(tmp_path, processes=2, steps=200))
    assert not multiprocessing.active_children()
