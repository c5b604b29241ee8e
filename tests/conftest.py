import multiprocessing
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

# a busy machine is no reason to fail
settings.register_profile("no_timings", deadline=None)
settings.load_profile("no_timings")

MICRO = """
# two scenes and a folder task over 16 px, 16 codes and micro models: the whole chain in seconds
seed: 0
data: {{image_size: 16}}
tasks:
  segmentation:
    {{scene: segmentation, samples: 12, validation_samples: 6, policy: segmentation, nearest: true}}
  pose: {{scene: pose, samples: 4, validation_samples: 6, policy: pose}}
  grey: {{images: {images}, annotations: {annotations}, validation_fraction: 0.4}}
tokenizer:
  {{num_codes: 16, code_dim: 4, channels: 32, steps: 6, batch_size: 8, min_codes_used: 0, min_psnr: 0}}
sentences: {{pairs: 2, validation: 5}}
teacher: {{size: tiny, steps: 8, batch_size: 4, learning_rate: 1.0e-3}}
scratch: {{learning_rate: 2.0e-3, warmup: 0.3}}
student: {{size: micro, steps: 6, batch_size: 4, learning_rate: 1.0e-3}}
prompting: {{pictures: 2}}
trainer: {{log_every: 2, checkpoint_every: 3, accelerator: cpu}}
"""


def pytest_configure() -> None:
    """Let Ctrl-C reach what tests start: a shell has its background jobs, and their children, ignore it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Name and end processes that tests have left: the program's own end would wait for them, for ever."""
    # a loader's workers are daemons, which Python ends; a traceback may keep them until then
    left = [process for process in multiprocessing.active_children() if not process.daemon]
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's raises where a child is killed
    for process in left:
        process.kill()
    if left:
        print(f"\nerror: processes were left behind: {[process.name for process in left]}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Models this small only lose by threads, ten times over where another process keeps a core busy."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_pairs(folder: Path, num: int = 10) -> None:
    """`images/NAME.jpg`, 24x20 blocks of colour, and `annotations/NAME.png`, the same in grey."""
    rng = np.random.default_rng(0)
    for name in ("images", "annotations"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number in range(num):
        picture = Image.fromarray(rng.integers(256, size=(5, 6, 3)).astype(np.uint8)).resize((24, 20), 0)
        picture.save(folder / "images" / f"{number}.jpg")
        picture.convert("L").save(folder / "annotations" / f"{number}.png")


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """A folder with ten pairs in `images/` and `annotations/`."""
    write_pairs(tmp_path / "pairs")
    return tmp_path / "pairs"


@pytest.fixture
def micro(tmp_path: Path, pairs: Path) -> Path:
    """A recipe file that runs every stage in seconds."""
    recipe = tmp_path / "micro.yaml"
    recipe.write_text(MICRO.format(images=pairs / "images", annotations=pairs / "annotations"))
    return recipe


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the micro recipe: `micro.yaml`, `pairs/`, `run/`. Read it; copy it to change it."""
    import torch

    from delvm import fit

    root = tmp_path_factory.mktemp("finished")
    write_pairs(root / "pairs")
    recipe = root / "micro.yaml"
    recipe.write_text(
        MICRO.format(images=root / "pairs" / "images", annotations=root / "pairs" / "annotations")
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert fit.run(recipe, [f"run_dir={root / 'run'}"]) == 0
    torch.set_num_threads(threads)
    return root


@pytest.fixture(scope="session")
def tokenizer():
    """A tokenizer of 8 px, 4 tokens a picture and 16 codes, untrained."""
    import torch

    from delvm.tokenizer.training import TokenizerConfig, build

    found = build(TokenizerConfig(num_codes=16, code_dim=4, channels=32), 8).eval()
    torch.nn.init.normal_(found.codebook, generator=torch.Generator().manual_seed(0))
    return found
