"""What is shown of a run: live lines that fit a terminal, plain lines elsewhere."""

import io
import logging
import re
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from hyperjax.engine import compiled
from hyperjax.engine.progress import Progress, fitted

ROOT = Path(__file__).parents[2]


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    """A clock that is set by hand."""

    now = 100.0

    def __call__(self):
        return self.now


def plain(total, **options):
    stream, clock = io.StringIO(), Clock()
    return Progress("fedavg", total, stream=stream, clock=clock, **options), clock


def written(shown: Progress) -> list[str]:
    return shown._view._stream.getvalue().splitlines()


def test_a_plain_stream_gets_lines_at_most_every_two_seconds():
    shown, clock = plain(20)
    # Ten seconds a round: twenty rounds take 200 in all.
    for done, seconds in ((0, 0), (1, 10), (2, 11), (3, 30), (20, 30.5)):
        clock.now = 100.0 + seconds
        shown.update(done, {"loss": f"{done}.5", "zacc": "50.00"})
    shown.close()
    assert written(shown) == [
        "fedavg | round 0/20 | loss 0.5 | zacc 50.00 | left ?",
        "fedavg | round 1/20 | loss 1.5 | zacc 50.00 | left 3m10s",
        "fedavg | round 3/20 | loss 3.5 | zacc 50.00 | left 2m50s",
        "fedavg | round 20/20 | loss 20.5 | zacc 50.00 | left 0s",
    ]


def test_what_is_said_stays_above_the_lines():
    shown, _ = plain(2)
    shown.stage("reading digits")
    shown.say("classes  10\nleft out nothing")
    shown.close()
    assert written(shown) == [
        "fedavg | reading digits",
        "classes  10",
        "left out nothing",
    ]
    terminal = Terminal()
    live = Progress("fedavg", 2, stream=terminal)
    live.say("before there are any")
    live.stage("reading digits")
    live.say("[red]as it is[/red] " + "x" * 200)
    live.close()
    assert terminal.getvalue().startswith("before there are any\n")
    assert "[red]as it is[/red] " + "x" * 200 in terminal.getvalue()


def test_stages_are_said_once_and_the_first_at_once():
    shown, clock = plain(2)
    shown.stage("reading digits")
    assert written(shown) == ["fedavg | reading digits"]
    clock.now += 5.0
    for _ in range(3):
        shown.stage("training")
    shown.stage("writing the report")
    shown.close()  # which is over before it could be said
    assert written(shown)[1:] == ["fedavg | training"]


def test_a_long_stage_is_said_to_go_on():
    shown, clock = plain(2)
    shown.stage("training")
    shown.compiling("rounds")
    clock.now += 45.0
    ticks = iter([False, False, True])
    shown._view._closed.set()
    shown._view._ticker.join()
    shown._view._closed = type("", (), {"wait": lambda self, _: next(ticks)})()
    shown._view._tick()
    assert written(shown) == [
        "fedavg | training",
        "fedavg | compiling the training program",
    ]
    clock.now += 45.0
    ticks = iter([False, False, True])
    shown._view._tick()
    assert written(shown)[2:] == ["fedavg | compiling the training program, 1m30s"]


def test_time_left_does_not_count_compilation():
    shown, clock = plain(10)
    shown.update(0, {})
    shown.compiling("rounds")
    clock.now += 60.0
    shown.compiling(None)
    clock.now += 5.0  # of work for five rounds
    shown.update(5, {})
    assert shown.left() == "5s"
    clock.now += 2.0
    assert shown.left() == "3s"
    shown.compiling("evaluate")  # time stands still
    clock.now += 30.0
    assert shown.left() == "3s"
    shown.compiling(None)
    clock.now += 30.0
    assert shown.left() == "0s"


def test_a_continued_run_counts_its_own_rounds_only():
    shown, clock = plain(100)
    shown.update(50, {})
    clock.now += 10.0
    shown.update(60, {})
    assert shown.left() == "40s"


def test_a_compiler_says_what_it_compiles():
    heard = []
    program = compiled.Compiled()
    program.watcher = heard.append
    for _ in range(2):  # the second finds the program
        program("double", lambda x: 2 * x, (jnp.ones(3),))
    assert heard == ["double", None]


@pytest.mark.parametrize("width", [10, 20, 40, 79, 80, 120, 300])
@pytest.mark.parametrize("total", [0, 10])
def test_live_lines_fit_whatever_the_width(width, total, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    stream, clock = Terminal(), Clock()
    shown = Progress("hyperfedzero_tuned", total, stream=stream, clock=clock)
    shown.stage("reading mnist5k, building hyperfedzero")
    shown.update(0, {"gACC": "10.00", "pACC": "10.00", "zACC": "10.00", "sent": "0 B"})
    clock.now += 5.0
    if total:
        shown.update(5, {"loss": "2.30", "samples/s": "123,456"})
    shown.compiling("evaluate")
    clock.now += 75.0
    shown._view._live.refresh()
    shown.close()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\n", stream.getvalue()).replace(
        "\r", "\n"
    )
    assert max(map(len, text.splitlines())) <= width
    assert text.splitlines()[-1].startswith("hyperfedzero_tuned"[:width])
    if width >= 80 and total:
        assert "round 5/10, 5s left" in text
        assert "loss 2.30 | samples/s 123,456 | round 0: gACC 10.00 | pACC" in text
        assert "compiling the evaluation program, 1m15s" in text
        assert "━" in text


def test_whole_fields_fit_or_are_left_out():
    fields = ["run", "loss 0.4123", "zACC 93.06"]
    assert fitted(fields, 30) == "run | loss 0.4123 | zACC 93.06"
    assert fitted(fields, 29) == "run | loss 0.4123"
    assert fitted(fields, 2) == "ru"
    assert fitted([], 2) == ""


def test_a_terminal_is_left_in_order_when_it_fails(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    handler = logging.StreamHandler(stream)
    monkeypatch.setattr(logging.root, "handlers", [handler])
    with pytest.raises(KeyboardInterrupt), Progress("run", 3) as shown:
        shown.stage("training")
        assert handler.stream is sys.stderr is not stream
        logging.warning("something is odd")
        print("and this", file=sys.stderr)
        shown.update(1, {"loss": "1.5"})
        raise KeyboardInterrupt
    assert sys.stderr is stream and handler.stream is stream
    text = stream.getvalue()
    assert "something is odd\n" in text and "and this\n" in text
    assert text.endswith("run | round 1/3 | loss 1.5\n")
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is back


@pytest.mark.parametrize(
    ("first", "arguments", "stream", "said"),
    [
        ("-m", [], Terminal, "Loading JAX ...\n"),
        ("-m", ["--help"], Terminal, ""),
        ("-m", [], io.StringIO, ""),
        ("notebook.py", [], Terminal, ""),
    ],
)
def test_the_first_words_come_before_imports(
    first, arguments, stream, said, monkeypatch
):
    monkeypatch.setattr(sys, "argv", [first, *arguments])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "x", *arguments])
    monkeypatch.setattr(sys, "stderr", stream())
    exec((ROOT / "experiments/__init__.py").read_text(), {})
    assert sys.stderr.getvalue() == said


def test_nothing_shown_nothing_ended():
    for stream in (Terminal(), io.StringIO()):
        with Progress("run", 1, stream=stream):
            pass
        assert stream.getvalue() == ""


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with Progress("run", 1, stream=stream) as shown:
        shown.stage("reading")
        shown.update(1, {"loss": "0.5"})
    assert stream.getvalue() == "run | reading\nrun | round 1/1 | loss 0.5 | left ?\n"
    assert "\x1b" not in stream.getvalue()


def test_a_short_command_says_on_a_terminal_what_it_does(monkeypatch):
    from hyperjax.launch import cli

    for stream, said in ((Terminal(), "export | reading runs/x"), (io.StringIO(), "")):
        monkeypatch.setattr(sys, "stderr", stream)
        with cli.doing("export", "reading runs/x"):
            pass
        assert said in stream.getvalue() and bool(said) == bool(stream.getvalue())
