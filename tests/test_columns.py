"""The benchmarks: columns, their ratios and tables, what a results file keeps. (The steps themselves need weights of full size.)"""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from checkpoints.files import write_json
from eval.peers import benchmark, columns, scaling, step, timing, training

TIMES = {"diffusers": [10.0, 20.0, 10.0], "plain": [9.0, 22.0, 11.0], "fast": [7.0, 13.0, 8.0], "diffusers, memory kept": [9.0, 19.0, 9.0]}


def test_columns_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def measure(module: str, folder: Path, column: str, dtype: str) -> dict[str, float]:
        asked.append(column)
        assert (module, dtype) == ("eval.peers.step", "bfloat16")
        return {"seconds": TIMES[column][asked.count(column) - 1]}

    monkeypatch.setattr(columns, "measured", measure)
    values = columns.take_turns("eval.peers.step", Path("x"), [*step.COLUMNS], 3, "bfloat16")
    assert asked == [*step.COLUMNS] * 3 and values == {"seconds": TIMES}


def test_a_measurement_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"eval.peers.step could not measure plain: .*sd15.safetensors"):
        columns.measured("eval.peers.step", tmp_path, "plain", "float32")


def test_ratios_are_taken_by_round() -> None:
    """The ratio of the medians would be 1.1 and 0.8."""
    plain, fast, kept = columns.lines("step", {"seconds": TIMES}, step.RATIOS)
    assert plain == ["step, plain", "11.0 s", "10.0 s", "1.10 [0.90, 1.10]"]
    assert fast == ["step, fast", "8.0 s", "10.0 s", "0.70 [0.65, 0.80]"]
    assert kept[-1] == "0.78 [0.68, 0.89]"


def test_every_ratio_has_its_columns() -> None:
    assert {name for pair in step.RATIOS.values() for name in pair} == set(step.COLUMNS)
    assert {network for network, _ in step.COLUMNS.values()} <= {"theirs", *step.FORMS}
    assert {*scaling.NETWORKS} <= {"theirs", *step.FORMS}
    assert {name for pair in training.RATIOS.values() for name in pair} == set(training.COLUMNS)


def test_the_operations_of_a_step() -> None:
    """1.354e12 without attention (measured on diffusers' UNet), and 0.25e12 of attention."""
    assert step.operations() == pytest.approx(1.607e12, rel=1e-3)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
def test_the_peak_counts_what_was_freed_before_the_end_but_not_before_the_start() -> None:

    def use(size: int) -> None:
        with mmap.mmap(-1, size) as pages:  # not from the heap, which may have kept memory of other tests
            for start in range(0, size, mmap.PAGESIZE):
                pages[start] = 1

    use(600 << 20)
    training.forget_peak()
    floor = timing.memory("VmHWM")
    use(200 << 20)
    assert 150 << 20 < timing.memory("VmHWM") - floor < 300 << 20


def test_the_table_shows_time_memory_and_the_limit() -> None:
    values = {"seconds": {name: [2.0, 4.0] for name in training.COLUMNS}, "gigabytes": {name: [3.0, 3.0] for name in training.COLUMNS}}
    values["gigabytes"]["diffusers"] = [6.0, 6.0]
    page = benchmark.table({"training step": {"values": values}, "step, float32": {"values": {"seconds": TIMES}, "limit": 5.0}})
    assert "| training step, bfloat16, --checkpointing 1 | 3.0 GB | 6.0 GB | 0.50 [0.50, 0.50] |" in page
    assert "| step, float32: at the peak of this machine | 5.0 s |  |  |" in page
    assert page.index("step, float32, fast") < page.index("training step")


def test_loads_keep_every_round_but_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one reads from the disk. The memory is a share, and has no ratio."""
    took = {"ours": iter((9.0, 2.0, 3.0)), "theirs": iter((1.0, 2.0, 2.0))}

    def measure(module: str, folder: Path, side: str, dtype: str) -> dict[str, float]:
        assert (module, dtype) == ("eval.peers.loading", "float16")
        return {"seconds": next(took[side]), "seconds_read": 4.0, "memory_read": 0.016}

    for name in ("unet", "vae", "text_encoder"):
        (tmp_path / "diffusers" / name).mkdir(parents=True)
    monkeypatch.setattr(columns, "measured", measure)
    row = benchmark.loading(tmp_path, 2, "float16")
    assert row["values"]["seconds"] == {"ours": [2.0, 3.0], "theirs": [2.0, 2.0]}
    page = benchmark.table({"load, float16": row})
    assert "| load, float16 | 2.50 s | 2.00 s | 1.25 [1.00, 1.50] |" in page
    assert "| load, float16, and read | 4.0 s | 4.0 s | 1.00 [1.00, 1.00] |" in page
    assert "| load, float16: anonymous memory / weights | 0.02 | 0.02 |  |" in page


def test_rows_of_another_machine_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: Callable[[Path, int], dict[str, Any]] = lambda folder, rounds: {"ours": 1.0, "theirs": 2.0, "ratio": 0.5}  # noqa: E731
    monkeypatch.setattr(benchmark, "ROWS", dict.fromkeys(("a", "b"), measured))
    monkeypatch.setattr(benchmark.official, "write", lambda folder: None)
    out = tmp_path / "benchmark.json"
    benchmark.evaluate(tmp_path, out, 3)
    again = benchmark.evaluate(tmp_path, out, 5, ["b"])
    assert (again["a"]["rounds"], again["b"]["rounds"]) == (3, 5) and json.loads(out.read_text()) == again
    assert again["b"]["load"] >= 0
    write_json(out, again | {"machine": "an abacus"})
    with pytest.raises(ValueError, match=r"an abacus.*measure all rows, or name another --out"):
        benchmark.evaluate(tmp_path, out, 5, ["b"])
    with pytest.raises(ValueError, match="the benchmark has no row 'c': use one of a; b"):
        benchmark.evaluate(tmp_path, out, 5, ["c"])


def test_scaling_measures_only_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int, int]] = []

    def network_of(folder: Path, name: str, dtype: object) -> Callable[[int, int], Callable[[], None]]:
        return lambda batch, side: lambda: calls.append((name, batch, side))

    monkeypatch.setattr(scaling, "network_of", network_of)
    monkeypatch.setattr(scaling.official, "write", lambda folder: None)
    out = tmp_path / "scaling.json"
    results = scaling.evaluate(tmp_path, out, 2)
    assert {(batch, side) for _, batch, side in calls} == {(1, s) for s in scaling.SIDES} | {(b, scaling.SMALL) for b in scaling.BATCHES}
    assert all(len(times) == 2 for point in results["points"].values() for times in point.values())
    del results["points"]["128, 1"]
    write_json(out, results)
    calls.clear()
    scaling.evaluate(tmp_path, out, 2)
    assert {(batch, side) for _, batch, side in calls} == {(1, 128)}
    monkeypatch.setattr(scaling, "network_of", None)  # no network is loaded if nothing is missing
    assert scaling.evaluate(tmp_path, out, 2).keys() == results.keys()
    results["points"] = {f"{side}, {batch}": {name: [1.0, 2.0] for name in scaling.NETWORKS} for side, batch in scaling.POINTS}
    assert "| 32 x 32 | 16 | 1.50 s | 1.50 s | 1.50 s | 1.00 | 1.00 |" in scaling.table(results)
    scaling.plot(results, tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").width == 1200
