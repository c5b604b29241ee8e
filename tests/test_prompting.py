import numpy as np

from delvm.evaluate.prompting import GAP, LINE, SIDE, grid, load_pictures, save_pictures


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


def test_a_grid_has_rows_of_captioned_pictures():
    rng = np.random.default_rng(0)
    pictures = list(rng.integers(256, size=(3, 8, 8, 3)).astype(np.uint8))
    found = np.asarray(grid([[("a", pictures[0]), ("", pictures[1])], [("b", pictures[2])]]))
    assert found.shape == (GAP + 2 * (LINE + SIDE + GAP), GAP + 2 * (SIDE + GAP), 3)

    def cell(row, column):
        top, left = GAP + row * (LINE + SIDE + GAP), GAP + column * (SIDE + GAP)
        caption, picture = np.split(found[top : top + LINE + SIDE, left : left + SIDE], [LINE])
        return caption.min() < 200, picture[::16, ::16]  # a pixel is 16 wide

    for place, expected, captioned in (((0, 0), 0, True), ((0, 1), 1, False), ((1, 0), 2, True)):
        assert cell(*place)[0] == captioned
        np.testing.assert_array_equal(cell(*place)[1], pictures[expected])
    assert (cell(1, 1)[1] == 255).all()


def test_large_pictures_stay_as_they_are_in_a_grid():
    picture = np.random.default_rng(0).integers(256, size=(200, 200, 3)).astype(np.uint8)
    found = np.asarray(grid([[("W" * 100, picture)]]))
    assert found.shape == (2 * GAP + LINE + 200, 2 * GAP + 200, 3)
    np.testing.assert_array_equal(found[GAP + LINE :][:200, GAP:][:, :200], picture)
    assert (found[:, -GAP:] == 255).all()  # the caption ends with its picture
