import pytest

from delvm.errors import UserError, exit_status


def ending(error):
    def command():
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (UserError("run_dir: 'x' is a file"), 2, "error: run_dir: 'x' is a file\n"),
        (
            FileNotFoundError(2, "No such file or directory", "a.png"),
            2,
            "error: a.png: No such file or directory\n",
        ),
        (OSError("cannot identify image file"), 2, "error: cannot identify image file\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_what_the_user_can_mend_is_one_line(error, status, said, capsys):
    assert exit_status(ending(error)) == status
    assert capsys.readouterr().err == said


def test_a_command_that_ends_well_says_nothing(capsys):
    assert exit_status(lambda: "anything") == 0
    assert capsys.readouterr().err == ""


def test_our_own_mistakes_are_not_hidden():
    with pytest.raises(AssertionError):
        exit_status(ending(AssertionError()))
