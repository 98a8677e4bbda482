import io
import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from detector.image import read_image
from train.plot import _group_by_model, _group_label, _label, _mean, main
from train.run_folder import RunFolder


def make_run(path, steps):
    path.mkdir()
    run = RunFolder(path)
    for step in range(1, steps + 1):
        run.append_metrics({"step": step, "lr": 0.1, "loss": 1 / step, "loss_cls": 0.5 / step})
    run.append_metrics({"step": steps, "AP": 0.3, "AP50": 0.5})
    return path


def test_draws_several_runs(tmp_path, capsys):
    runs = [make_run(tmp_path / "a", 3), make_run(tmp_path / "b", 700)]
    assert main([*map(str, runs), "--out", str(tmp_path / "c.png")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "c.png")
    picture = read_image(tmp_path / "c.png")
    assert picture.shape[0] > 500
    assert len({tuple(color) for color in picture.reshape(-1, 3)[::7].tolist()}) > 20


def configure(run, **values):
    """Write the config.json of a run."""
    start = {"world_size": values.pop("world_size", 1), "commit": values.pop("commit", "a")}
    RunFolder(run)._config.write_text(json.dumps({"out": str(run), "starts": [start], **values}))


def test_runs_that_differ_in_the_seed_are_one_group(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = {"dcn-0": ("v2", 0), "plain-0": (None, 0), "dcn-1": ("v2", 1), "plain-1": (None, 1)}
    runs = []
    for name, (dcn, seed) in values.items():
        runs.append(make_run(Path(name), 4))
        configure(runs[-1], seed=seed, model={"dcn": dcn})
    unknown = make_run(Path("unknown"), 4)
    damaged = make_run(Path("damaged"), 4)
    RunFolder(damaged)._config.write_text("{")

    dcn_0, plain_0, dcn_1, plain_1 = runs
    groups = _group_by_model([*runs, unknown, damaged])
    assert groups == [[dcn_0, dcn_1], [plain_0, plain_1], [unknown], [damaged]]
    labels = [_group_label(group) for group in groups]
    assert labels == ["dcn, mean of 2 seeds", "plain, mean of 2 seeds", "unknown", "damaged"]
    assert main([*map(str, runs), "--out", "c.png"]) == 0


@pytest.mark.parametrize(
    "other",
    [{"seed": 0}, {"seed": 1, "commit": "b"}, {"seed": 1, "world_size": 8}],
    ids=["seed", "commit", "processes"],
)
def test_runs_that_differ_in_more_are_apart(tmp_path, other):
    before = make_run(tmp_path / "before", 2)
    after = make_run(tmp_path / "after", 2)
    configure(before, seed=0)
    configure(after, **other)
    assert _group_by_model([before, after]) == [[before], [after]]


def test_a_group_without_a_common_name_has_all_names():
    assert _group_label([Path("dcn"), Path("another")]) == "dcn, another, mean of 2 seeds"


def test_the_mean_of_runs_is_over_the_steps_that_all_have():
    assert _mean([[(1, 2.0), (2, 4.0), (3, 0.0)], [(2, 8.0), (1, 0.0)]]) == [(1, 1.0), (2, 6.0)]
    assert _mean([[(5, 0.25)]]) == [(5, 0.25)]


@pytest.mark.parametrize("out", ["c.png", "c.nonsense"])
def test_errors_are_one_line(tmp_path, capsys, out):
    run = tmp_path / "empty" if out == "c.png" else make_run(tmp_path / "a", 3)
    assert main([str(run), "--out", str(tmp_path / out)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_names_that_matplotlib_reads_in_its_own_way(tmp_path, capsys):
    names = ["a$b", r"$\frac{", "_hidden", "\u732b", "two\nlines", "esc\x1b[2J", "x" * 250, "lat\udcff"]
    runs = []
    for name in names:
        run = RunFolder(tmp_path / name)
        run.path.mkdir()
        run.append_metrics({"step": 1, "loss": 1.0, r"loss_$\frac{": 0.5, "loss_\x1b\ud800": 0.5})
        runs.append(str(run.path))
    assert main([*runs, "--out", str(tmp_path / "c\n.png")]) == 0
    assert capsys.readouterr() == (f"{tmp_path}/c\\n.png\n", "")


@pytest.mark.parametrize("name", ["a$b", r"$\frac{", "$x$ _y", "_hidden", "two\nlines", "lat\udcff", "x" * 1000])
def test_every_run_is_in_the_legend(name):
    figure = Figure()
    panel = figure.subplots()
    panel.plot([0, 1], [0, 1], label=_label(name))
    assert len(panel.get_legend_handles_labels()[1]) == 1
    panel.set(title=_label(name))
    figure.legend()
    figure.savefig(io.BytesIO())
