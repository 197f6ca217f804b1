"""Rows and options of a list that cannot be met: one line each, before any clip is made."""

from __future__ import annotations

from pathlib import Path

import pytest
from list_folder import write_list


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "x", "output": "../a.mp4"}, "output '../a.mp4' is not allowed; name a file in the folder of results"),
        ({"prompt": "x", "output": "/tmp/a.mp4"}, "is not allowed"),
        ({"prompt": "x", "output": ".unfinished/a.mp4"}, "is not allowed"),
        ({"prompt": "x", "output": "a.avi"}, "use one of .mp4"),
        ({"prompt": "x", "output": "a.png"}, "would be a folder of 5 pictures; name a .mp4"),
        ({"prompt": "x", "output": "a.gif", "fps": 60}, "(gif: 50)"),
        ({"prompt": "x", "output": "Good.mp4"}, "Good.mp4 is written by line 1 too"),
        ({"prompt": "x", "seed": [1, 1]}, "is written by line 2 too"),
        ({"prompt": "x", "seed": []}, "seed [] is not allowed; give a whole number, or a list of them"),
        ({"prompt": "x", "num_videos_per_prompt": 10**8}, "num_videos_per_prompt 100000000 is not allowed"),
        ({"prompt": "word " * 5000}, "this model reads at most 256"),
        ({"prompt": "x", "guidance_scale": 0}, "guidance_scale 0 is not allowed"),
        ({"prompt": "x", "height": 65}, "height 65 is not a multiple of 8"),
        ({"prompt": "x", "width": 2000, "height": 8}, "width 2000 is too large for this model; allowed: 8 to"),
        ({"prompt": "x", "output": "y" * 248 + ".mp4"}, ".mp4.json: File name too long"),
        ({"prompt": "x", "output": "y" * 300 + ".mp4"}, "File name too long"),
        ({"prompt": "x", "output": "good.mp4/b.mp4"}, "would lie in good.mp4, which is a clip"),
        ({"prompt": "x", "seed": -1}, "seed -1 is not allowed"),
        ({"prompt": "x", "image": "a.png", "video": "b.mp4"}, "both image and video are given"),
        ({"prompt": ["x", "y"], "prompt_frames": [6, 3]}, "prompt_frames [6, 3] is not allowed"),
        ({"prompt": "x", "num_frames": 4001, "fps": 60}, "this model was made for at most 8192"),
    ],
)
def test_a_bad_row_is_told_before_any_work(generate, monkeypatch, row, message):
    monkeypatch.setattr("lumos.models.lumos1.pipeline.generate_frames", lambda *a, **k: pytest.fail("the model ran"))
    monkeypatch.setattr("lumos.commands.generate_list.make_clips", lambda *a: (1, 0))
    code, _, err = generate("--prompts", write_list({"prompt": "x", "output": "good.mp4"}, row), "--output-dir", "out")
    assert code == 1
    assert len(err) == 2
    assert err[0].startswith("list.jsonl line 2: ")
    assert message in err[0]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--prompts", "list.txt", "--output", "a.mp4"], "--output has no effect on several clips"),
        (["--prompts", "list.txt", "--preview", "a.mp4"], "--preview has no effect on several clips"),
        (["--prompts", "list.txt", "--seed", "1", "2"], "gives 2 seeds for a list"),
        (["--prompts", "list.txt", "--batch-size", "0"], "--batch-size 0 is not allowed"),
        (["--prompts", "list.txt", "--num-videos-per-prompt", "0"], "--num-videos-per-prompt 0 is not allowed"),
        (["--prompts", "list.txt", "--shard", "3/2"], "shard '3/2' is not allowed"),
        (["--prompts", "list.txt", "--prompt", "x"], "not allowed with argument"),
        (["--prompts", "nowhere.txt"], "cannot read nowhere.txt as a list of prompts"),
        (["--prompt", "x", "--seed", "1", "-2"], "seed -2 is not allowed"),
        (["--prompt", "x", "--seed", "1", "2", "--num-frames", "6"], "num_frames 6 is not allowed"),
        (["--prompt", "x", "--seed", "1", "2", "--num-videos-per-prompt", "3"], "seed is a list of 2, but there are 3 clips"),
        (["--prompt", " ", "--seed", "1", "2"], "the prompt is empty"),
        (["--prompt", "x", "--num-videos-per-prompt", "0"], "--num-videos-per-prompt 0 is not allowed"),
        (["--prompt", "x", "--num-videos-per-prompt", "2", "--shard", "1/2"], "several processes need one --seed to agree on"),
        (["--prompt", "x", "--seed", "1", "1"], "x-1.mp4 is written by another --seed 1 too"),
    ],
)
def test_wrong_options_are_one_line_and_make_nothing(generate, args, message):
    Path("list.txt").write_text("x\n")
    code, _, err = generate(*args, "--output-dir", "out")
    assert code == 2
    assert len(err) == 1
    assert message in err[0]
    assert not Path("out").exists()
