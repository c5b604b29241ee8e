"""Sentences a second of the token store against parsing DeLVM's JSON lines: python tools/bench_sentences.py

Both give the 4,096 tokens of eight pairs in memory, from files that the system holds in its cache. The store
composes other pairs each epoch, one sentence by one (`dataset[i]`) or a batch at a time (`__getitems__`); the
JSON lines are fixed. The rounds of all are interleaved, so that a busy machine slows all alike. Printed is
each one's fastest round, in brackets its median one.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from delvm.tokens.balance import BalanceConfig, plan
from delvm.tokens.formats import write_delvm
from delvm.tokens.rows import TrainingSentences
from delvm.tokens.sentences import SentencesConfig, find_forms
from delvm.tokens.store import SHARD_BYTES, Layout, code_dtype, open_store, write_manifest

CODES, PAIRS, TOKENS = 8192, 8, 256  # a sentence: 8 pairs of pictures of 256 tokens
WANTED = {"one by one": 40, "batched": 150}


def write_store(folder: Path, samples: int, views: int, shard_bytes: int) -> TrainingSentences:
    """A store of random codes, opened for training."""
    shape = (samples, views, 2, TOKENS)
    layout = Layout.plan(folder / "pairs.train", shape, code_dtype(CODES), shard_bytes)
    codes = np.random.default_rng(0).integers(CODES, size=shape)
    layout.write_all(layout.missing(), [codes.reshape(-1, 2, TOKENS)])
    tasks = {"pairs": {"train": layout.describe(), "validation": layout.describe()}}
    (folder / "pairs.validation").symlink_to(folder / "pairs.train")
    write_manifest(folder, {"tokenizer": "", "num_codes": CODES, "tokens_per_image": TOKENS, "tasks": tasks})
    config = SentencesConfig(pairs=PAIRS, specials=False)
    forms = find_forms(config, {"pairs": (1, 2)}, TOKENS)
    plans = plan({"pairs": samples}, {"pairs": 2 * TOKENS}, BalanceConfig(head_views=views, max_views=views))
    return TrainingSentences(open_store(folder), plans, forms, config, num_rows=1 << 40, seed=0)


def parse_lines(folder: Path, numbers: np.ndarray) -> None:
    """What DeLVM's loader does for each of these lines."""
    meta = np.load(folder / "train.bin.meta", mmap_mode="r")
    with (folder / "train.bin").open("rb") as file:
        for number in numbers.tolist():
            file.seek(int(meta[number, 0]))
            tokens = np.array(json.loads(file.readline())["tokens"])
            assert len(tokens) == PAIRS * 2 * TOKENS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--views", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--shard-bytes", type=int, default=SHARD_BYTES)
    arguments = parser.parse_args()
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        dataset = write_store(folder / "store", arguments.samples, arguments.views, arguments.shard_bytes)
        num_lines = dataset.sentences_per_epoch
        write_delvm(folder, (dataset[i]["tokens"].numpy() for i in range(num_lines)))
        rng = np.random.default_rng(0)
        done = 0  # rows given so far: training never reads one twice

        def one_by_one() -> int:
            nonlocal done
            for index in range(done, done + 2000):
                dataset[index]
            done += 2000
            return 2000

        def batched() -> int:
            nonlocal done
            batches = max(1, 8000 // arguments.batch)
            for _ in range(batches):
                dataset.__getitems__(range(done, done + arguments.batch))
                done += arguments.batch
            return batches * arguments.batch

        def json_lines() -> int:
            parse_lines(folder, rng.integers(num_lines, size=100))
            return 100

        ways: dict[str, Callable[[], int]] = {
            "JSON lines": json_lines,
            "one by one": one_by_one,
            "batched": batched,
        }
        speeds: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(arguments.rounds + 1):
            for name, way in ways.items():
                begun = time.perf_counter()
                sentences = way()
                if number:  # the first round warms up
                    speeds[name].append(sentences / (time.perf_counter() - begun))
    for name, found in speeds.items():
        fastest, median = max(found), statistics.median(found)
        ratio = fastest / max(speeds["JSON lines"])
        typical = median / statistics.median(speeds["JSON lines"])
        wanted = f"; wanted: {WANTED[name]}x" if name in WANTED else ""
        print(
            f"{name:<10} {fastest:>9,.0f} ({median:,.0f}) sentences/s, {ratio:.1f}x ({typical:.1f}x){wanted}"
        )


if __name__ == "__main__":
    main()
