"""What the terminal shows of a run."""

from __future__ import annotations

from grape.progress import TrainingProgress, curve, heldout_table, training_table
from grape.report import show


def test_a_curve_has_a_bar_for_each_part_and_goes_from_least_to_greatest():
    assert curve([]) == ""
    assert curve([0.5]) == "▁"
    assert curve([0, 1]) == "▁█"
    assert curve([3, 3, 3]) == "▁▁▁"
    assert curve(list(range(8))) == "▁▂▃▄▅▆▇█"
    assert curve([0, 0, 7, 7, 1, 1], width=3) == "▁█▂"
    assert len(curve(list(range(1000)), width=24)) == 24


def test_where_there_is_no_terminal_a_run_says_some_lines(capsys):
    with TrainingProgress() as bar:
        for number in range(1, 101):
            bar.step(number, 100, {"weighted/mean": number / 100}, 0.5)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 21
    assert lines[0].startswith("training: step 1/100, 0.5 s/step  score 0.010 ▁")
    assert lines[1].startswith("training: step 5/100, 0.5 s/step  score 0.050 ▁")
    assert lines[-1].endswith("score 1.000 ▁▁▂▂▂▃▃▃▃▄▄▄▅▅▅▆▆▆▆▇▇▇██")


def test_held_out_results_stand_before_and_after(capsys):
    before = {"score/maths/correct": 0.25, "confidence/maths/correct": 1.0, "weighted/mean": 0.5, "weighted/std": 0.1}
    after = {
        "score/maths/correct": 0.75,
        "confidence/maths/correct": 0.9,
        "weighted/mean": 0.625,
        "score/maths/new": 1.0,
    }
    show(heldout_table({0: before, 50: after, 25: {}}))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1:] == [
        ["maths/correct", "0.250", "0.750", "+0.500", "0.900"],
        ["maths/new", "-", "1.000", "-", "-"],
        ["sum", "of", "weight", "x", "score", "0.500", "0.625", "+0.125", "-"],
    ]


def test_the_first_and_the_last_step_stand_side_by_side(capsys):
    first = {"weighted/mean": 0.1, "entropy": 2.0}
    last = {"weighted/mean": 0.9, "weighted/std": 0.0, "entropy": 1.0, "reward/mean": 1.25}
    show(training_table({5: first, 6: {}, 8: last}))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        ["training", "step", "5", "step", "8"],
        ["reward", "-", "1.250"],
        ["sum", "of", "weight", "x", "score", "0.100", "0.900"],
        ["entropy", "2.000", "1.000"],
    ]
