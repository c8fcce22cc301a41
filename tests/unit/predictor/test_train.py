"""Reading measured rows, splitting by family and scoring; fitting itself needs the train extra."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from predictor_onnx.train import card, dataset, split


def test_timm_rows_become_features_and_failed_runs_are_marked(tmp_path: Path) -> None:
    path = tmp_path / "timm.csv"
    path.write_text(
        "model,batch_size,measured_mib\nresnet50,8,3000\nresnet50,16,4000\n"
        "vgg16,8,9000\nvgg16,16,4000\nresnet18,8,3000\nresnet18,16,39000\nnever_heard_of,8,1\n"
    )
    rows, left_out = dataset.read_timm(path)
    assert left_out == {"model not in the catalog": 1}
    assert [(row.model, row.batch, row.clean) for row in rows] == [
        ("resnet50", 8, True),
        ("resnet50", 16, True),
        ("vgg16", 8, False),
        ("vgg16", 16, False),
        ("resnet18", 8, True),
        ("resnet18", 16, False),
    ]
    assert rows[1].vector[5] == pytest.approx(2 * rows[0].vector[5])


def test_mlp_rows_become_features(tmp_path: Path) -> None:
    path = tmp_path / "mlp.csv.gz"
    layers = "[('linear', 30, 1860), ('batch_normalization', 30, 60), ('ReLU', 30, 0), ('linear', 12, 372)]"
    content = (
        "Filename,Activations-Params,Batch Size,Max GPU Memory (MiB)\n"
        f'input:61_output:12_depth:5_arch:pyramid_batch:7.out,"{layers}",7,1451\n'
        'odd.out,"[]",7,1451\n'
    )
    path.write_bytes(gzip.compress(content.encode()))
    rows, left_out = dataset.read_mlp(path)
    assert left_out == {"layer list is not understood": 1}
    assert (rows[0].family, rows[0].batch) == ("mlp_pyramid", 7)
    assert rows[0].parameter_mib * 2**20 / 4 == 1860 + 60 + 372


def test_the_split_is_drawn_by_seed() -> None:
    families = [*"abcdefghij", "mlp_pyramid", "mlp_uniform"]
    drawn = split.draw(families, 1)
    assert drawn == split.draw(reversed(families), 1)
    assert len(drawn) == 3
    assert drawn != split.draw(families, 2)


def test_scores_are_what_they_say() -> None:
    measured, point = np.array([1000.0, 2000.0, 4000.0]), np.array([900.0, 2000.0, 4400.0])
    found = card.errors(measured, point)
    assert found["mape_pct"] == pytest.approx(20 / 3)
    assert found["under_by_5_pct"] == pytest.approx(100 / 3)
    score = card.slices(np.array([5.0, 15.0, 15.0, 35.0]), np.array([5.0, 5.0, 35.0, 35.0]), (10, 20, 40))
    assert score["slice_exact_pct"] == 50
    assert score["slice_too_small_pct"] == score["slice_oversized_pct"] == 25
