"""The ceiling benchmark's arithmetic: slopes between two sizes, and what is left unexplained."""

import io
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs.bench.ceiling import Run, Usage, Workload, cpu_per_1000, write_rows


def run(rows: int, steps: dict[str, float], processes: dict[str, float]) -> Run:
    return Run(rows, 1.0, steps, (Usage(1.0, processes, {}, 0.0),))


def test_start_up_drops_out_of_the_slope_and_the_rest_is_told_apart() -> None:
    small = run(1000, {"start": 3.0, "read": 1.0}, {"driver": 5.0, "workers": 6.0})
    large = run(
        5000,
        {"start": 6.0, "read": 5.0, "commit": 2.0},
        {"driver": 7.0, "workers": 16.0, "replica": 2.0, "ray services": 1.0},
    )
    found = cpu_per_1000(small, large)
    assert found["cpu_s_per_1000_rows"] == pytest.approx(
        {"read": 1.0, "commit": 0.5, "driver": 0.5, "ray services": 0.25, "unaccounted": 0.75}
    )
    # workers: 10 s more, of which 3 loaded another tokenizer
    assert found["whole"] == pytest.approx((2 + 7 + 2 + 1) / 4)
    assert found["accounted"] == pytest.approx(2.25 / 3, abs=1e-3)


def test_rows_with_images_have_jpegs_of_about_50_kb(tmp_path: Path) -> None:
    write_rows(Workload.IMAGES, 3, tmp_path)
    (path,) = tmp_path.iterdir()
    images = [data for (data,) in pq.read_table(path).column("images").to_pylist()]
    assert len(images) == 3
    for data in images:
        assert 40_000 < len(data) < 60_000
        assert Image.open(io.BytesIO(data)).format == "JPEG"
