"""The check of the idea on Gaussians, in small."""

import json

import gaussian_ratio


def test_gaussian_ratios_are_compared_and_drawn(tmp_path, capsys):
    grid = ("--updates", 20, "--pairs", 20, 200, "--seeds", 0, "--held-out", 200)
    gaussian_ratio.main([str(a) for a in (*grid, "--out", tmp_path)])
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [(r["model"], r["pairs"]) for r in rows] == [
        ("joint", 20),
        ("factorised", 20),
        ("joint", 200),
        ("factorised", 200),
    ]
    assert (tmp_path / "figure.png").stat().st_size > 10_000
