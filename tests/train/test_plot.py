import io

import pytest
from matplotlib.figure import Figure

from detector.image import read_image
from train.plot import _label, main
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
