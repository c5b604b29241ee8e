import numpy as np

from delvm.evaluate.prompting import load_pictures, save_pictures


def test_pictures_come_back_as_they_were_saved(tmp_path):
    rng = np.random.default_rng(0)
    captions = ["example", "annotation", "query", "truth", "teacher"]
    rows = [[(c, rng.integers(256, size=(6, 6, 3)).astype(np.uint8)) for c in captions] for _ in range(12)]
    save_pictures(tmp_path, {"pose": rows[:2], "edges": rows[2:]})
    found = load_pictures(tmp_path)
    assert {task: len(entry) for task, entry in found.items()} == {"edges": 10, "pose": 2}
    for task, expected in (("pose", rows[:2]), ("edges", rows[2:])):
        for row, saved in zip(found[task], expected, strict=True):
            assert [caption for caption, _ in row] == captions
            for (_, one), (_, two) in zip(row, saved, strict=True):
                np.testing.assert_array_equal(one, two)
    assert load_pictures(tmp_path / "nothing") == {}
