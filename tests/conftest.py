from __future__ import annotations

import os

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    # If each worker used all cores, all would run many times slower. Libraries read this variable when they are imported.
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // int(workers)))

# Kernels of tests are few: a process that compiles them would cost more, because it imports torch. Also read at the import.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import comfyui
import pytest
import torch
from disk import Disk
from forks import Forks, trust_the_system
from hypothesis import settings
from micro import micro_config
from ranks import Ranks

from lumos import LumosConfig, LumosForVideoGeneration, device_peak

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.pop("LUMOS_SPRITES", None)  # the pictures are those of the repository
ROOT = Path(__file__).parents[1]
settings.register_profile("quick", deadline=None, max_examples=25)
settings.register_profile("thorough", deadline=None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--thorough", action="store_true", help="run every variant and every repetition of a test; without it, some of them"
    )


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile("thorough" if config.getoption("thorough") else "quick")
    trust_the_system()
    if hasattr(config.option, "loadscopereorder"):  # otherwise pytest-xdist begins with the files that have the most tests
        config.option.loadscopereorder = False


SHARED = (
    "test_deepspeed.py", "test_faults.py", "test_lora.py", "test_export.py", "test_prefetch.py", "test_adafactor.py",
    "test_muon.py", "test_token_batches.py", "test_auxiliary.py", "test_video_ranks.py", "test_kills.py",
    "test_distillation_ranks.py", "test_stiv_engines.py",
)  # fmt: skip
"""Files that run in one worker, one after the other, because they use one server of training processes (`ranks`) and its runs."""
LONGEST = (
    *SHARED, "test_ray_engine.py", "test_latent_distillation.py", "test_pruned_unets.py", "test_stiv_training.py",
    "test_bench.py", "test_planning.py", "test_list_stops.py", "test_workers.py", "test_video_training.py",
    "test_finetuning_page.py", "test_browser.py", "test_stiv_cost.py", "test_pruning.py", "test_same_losses.py",
    "test_compress_diffusers.py", "test_distillation_runs.py", "test_generate_list.py", "test_streaming.py",
    "test_torchscript.py", "test_demo_users.py", "test_distillation.py", "test_released.py", "test_ingest.py",
    "test_docs.py", "test_contract.py", "test_compress_commands.py", "test_tokenizer_starts.py",
)  # fmt: skip
"""Files that run first, the longest first, so that no worker is left alone with one of them at the end."""
COLLECTED = pytest.StashKey[tuple[set[str], set[str]]]()
STARTS_PROCESSES = {"ranks", "measured", "everything", "forks"}
"""Fixtures that start processes. A test that uses one, directly or through other fixtures, is slow."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if not STARTS_PROCESSES.isdisjoint(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
    left_out = [] if config.getoption("thorough") else [item for item in items if item.get_closest_marker("thorough")]
    if left_out:
        items[:] = [item for item in items if not item.get_closest_marker("thorough")]
        config.hook.pytest_deselected(items=left_out)
    config.stash[COLLECTED] = {item.nodeid for item in items}, {item.nodeid for item in left_out}
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONGEST)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object | None:
    """With --dist loadfile, return a scheduler for which the files of SHARED are one file."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "shared" if Path(file).name in SHARED else file

    return Scheduling(config, log)


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # imported modules stay in memory, so garbage collections may skip them, and forked processes do not copy them
    gc.set_threshold(20_000, 10, 10)  # with Python's own, 700, a twentieth of the time is spent on collections


@pytest.fixture(scope="session", autouse=True)
def quick_look_at_the_machine() -> None:
    """Let a run measure the machine's speed with one product, because no test needs the true speed."""
    device_peak.PROBE.update(seconds=0.0, products=1)


@pytest.fixture(scope="session")
def collected(pytestconfig: pytest.Config) -> tuple[set[str], set[str]]:
    """The names of the tests of this run, and of those that it leaves out without --thorough."""
    return pytestconfig.stash[COLLECTED]


@pytest.fixture(scope="session")
def times(pytestconfig: pytest.Config) -> Callable[[int, int], int]:
    """A function: `times(few, many)` returns the number of repetitions of a test, `many` with --thorough."""
    return lambda few, many: many if pytestconfig.getoption("thorough") else few


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """A server that runs the training command in several processes."""
    pytest.importorskip("deepspeed")
    made = Ranks(tmp_path_factory.mktemp("ranks"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of golden values: tests/golden, or another of the same form named by LUMOS_GOLDEN."""
    return Path(os.environ.get("LUMOS_GOLDEN", ROOT / "tests" / "golden"))


@pytest.fixture(scope="session")
def repo() -> Path:
    return ROOT


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Use one thread of torch, for tensors so small that threads would wait longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def forks(tmp_path_factory) -> Iterator[Forks]:
    """Starts Python programs in a tenth of a second."""
    made = Forks(tmp_path_factory.mktemp("forks"))
    yield made
    made.close()


@pytest.fixture
def no_sprite_pictures(tmp_path, monkeypatch) -> None:
    """LUMOS_SPRITES names a folder without pictures."""
    monkeypatch.setenv("LUMOS_SPRITES", str(tmp_path / "no-sprites"))


@pytest.fixture(scope="session")
def micro_folder(tmp_path_factory) -> Path:
    """A complete model folder of random weights: 64 codes, 8 x 8 pixels for each code, clips of 5 frames of 16 x 24 pixels."""
    from lumos import LumosPipeline
    from lumos.models.lumos1.settings import GenerationSettings
    from lumos.pipeline.defaults import ClipDefaults
    from tokenizer import TextTokenizer, VideoTokenizer, VideoTokenizerConfig

    torch.manual_seed(0)
    video = VideoTokenizer(
        VideoTokenizerConfig(
            channels=8, channels_mult=(1, 2), num_res_blocks=1, spatial_compression=8, temporal_compression=4,
            embedding_dim=3, levels=(4, 4, 4),
        )
    )  # fmt: skip
    symbols = [f"<reserved{i:03d}>" for i in range(1, 255)]
    captions = ["a red circle moves left on a gray background", "a small blue square grows", "the digit 7 moves up"]
    text = TextTokenizer.train(captions, 600, reserved_symbols=symbols)
    pipe = LumosPipeline(
        LumosForVideoGeneration(micro_config()), text, video,
        GenerationSettings(num_inference_steps=2, guidance_scale=2.0), ClipDefaults(5, 16, 24, 8, None),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "micro"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def comfy(monkeypatch, tmp_path):
    """Stand-ins for the modules of ComfyUI; its models are in `tmp_path / "models"`."""
    return comfyui.install(monkeypatch, tmp_path / "models")


@pytest.fixture
def nodes(comfy, monkeypatch):
    """The package of ComfyUI nodes."""
    yield from comfyui.loaded(monkeypatch)


@pytest.fixture
def config() -> LumosConfig:
    return micro_config()


@pytest.fixture
def model(config) -> LumosForVideoGeneration:
    torch.manual_seed(0)
    return LumosForVideoGeneration(config).eval()


@pytest.fixture
def disk(monkeypatch) -> Disk:
    return Disk(monkeypatch)
