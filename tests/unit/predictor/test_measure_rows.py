import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from predictor_onnx.configuration import Configuration, Precision
from predictor_onnx.measure import data_file
from predictor_onnx.measure.out_of_memory import card_was_full, tried_mib
from predictor_onnx.measure.rows import (
    Ending,
    Header,
    MeasuredRow,
    Outcome,
    RowsRefusedError,
    configuration_of,
    header_of,
    outcome_of,
    read,
)
from tests.unit.predictor.measuring_process import HEADER, OUTCOME

HEAD = header_of(json.dumps(HEADER))
GOOD = outcome_of(OUTCOME)
FULL = Outcome(Ending.OUT_OF_MEMORY, 3.5, allocated_at_least_mib=9000.0, device_at_least_mib=9500.0, detail="full")


def row(batch: int, outcome: Outcome = GOOD) -> MeasuredRow:
    return MeasuredRow("resnet", Configuration("timm", "resnet50", batch, (3, 224, 224)), outcome)


def written(path: Path, *rows: MeasuredRow) -> Path:
    with data_file.begin(path, HEAD) as file:
        for one in rows:
            file.append(one)
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", row(8), row(512, FULL))

    found = read(path)

    assert found.header == HEAD
    assert found.rows == (row(8), row(512, FULL))
    assert [one.outcome.censored for one in found.rows] == [False, True]


def test_a_compressed_file_is_read_as_well(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", row(8))
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))

    assert read(packed) == read(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"label": "traced"}, "its label is 'traced'"),
        ({"schema": 2}, "its schema is 2; this version reads 1"),
        ({"total_mib": "81559"}, "total_mib must be float"),
        ({"total_mib": -1.0}, "total_mib must be 0 or more"),
        ({"voltage": 1}, "other fields: voltage"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({**HEADER, **change}) + "\n")

    with pytest.raises(RowsRefusedError, match=words):
        read(path)


def test_a_table_of_traced_steps_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "traced.csv.gz"
    path.write_bytes(gzip.compress(b"source,model,batch\ntimm,resnet50,8\n"))

    with pytest.raises(RowsRefusedError, match=r"traced.csv.gz, line 1"):
        read(path)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("family",), 3),
        (("configuration", "batch"), 0),
        (("configuration", "batch"), True),
        (("configuration", "shape"), [3, "224", 224]),
        (("configuration", "precision"), "float8"),
        (("outcome", "ending"), "fine"),
        (("outcome", "reading"), None),
        (("outcome", "device_at_least_mib"), 5.0),
        (("outcome", "reading", "steps"), 1.5),
        (("outcome", "reading", "step_ms"), None),
        (("outcome", "reading", "step_ms"), float("nan")),
        (("outcome", "reading", "traced_mib"), 5.0),
    ],
)
def test_a_damaged_row_is_refused_by_its_line(tmp_path: Path, where: tuple[str, ...], value: object) -> None:
    path = written(tmp_path / "rows.jsonl", row(8), row(16))
    header, first, second = lines(path)
    inner = second
    for name in where[:-1]:
        inner = inner[name]
    inner[where[-1]] = value
    path.write_text("".join(json.dumps(one) + "\n" for one in (header, first, second)))

    with pytest.raises(RowsRefusedError, match=r"rows.jsonl, line 3: "):
        read(path)


@given(st.text(max_size=200))
def test_no_text_is_taken_for_a_row_or_breaks_the_reader(text: str) -> None:
    try:
        MeasuredRow.from_json(text)
    except ValueError:
        return
    pytest.fail("it was taken for a row")


def test_an_activity_that_cannot_be_told_is_none_and_not_zero() -> None:
    assert GOOD.reading is not None
    reading = dataclasses.replace(GOOD.reading, activity_percent=None, activity_source="unavailable")
    one = row(8, dataclasses.replace(GOOD, reading=reading))

    assert MeasuredRow.from_json(one.to_json()) == one


def test_a_configuration_in_a_list_may_leave_out_what_has_a_default() -> None:
    found = configuration_of(
        {"source": "timm", "model": "resnet18", "batch": 4, "shape": [3, 64, 64], "precision": "tf32"}
    )

    assert found == Configuration("timm", "resnet18", 4, (3, 64, 64), precision=Precision.TF32)


def test_a_file_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", row(8))
    before = path.read_bytes()

    with pytest.raises(RowsRefusedError, match="--resume"), data_file.begin(path, HEAD):
        pass

    assert path.read_bytes() == before


def test_a_row_is_on_disk_before_the_next_is_measured(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with data_file.begin(path, HEAD) as file:
        file.append(row(8))
        assert read(path).rows == (row(8),)


def test_resuming_takes_off_a_cut_line_and_goes_on(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", row(8), row(16))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(RowsRefusedError, match="line 3: the line was cut"):
        read(path)

    later = dataclasses.replace(HEAD, date="2026-02-03T00:00:00+00:00")
    with data_file.resume(path, later) as (file, known):
        assert known == (row(8),)
        file.append(row(32))

    assert read(path).rows == (row(8), row(32))
    assert read(path).header.date == HEAD.date


@pytest.mark.parametrize(
    "other",
    [{"card": "NVIDIA A100-SXM4-40GB"}, {"driver": "580.2"}, {"mig_profile": ""}, {"expandable_segments": True}],
)
def test_rows_of_two_machines_or_settings_are_never_in_one_file(tmp_path: Path, other: dict[str, Any]) -> None:
    path = written(tmp_path / "rows.jsonl", row(8))
    now: Header = dataclasses.replace(HEAD, **other)

    with pytest.raises(RowsRefusedError, match=next(iter(other))), data_file.resume(path, now):
        pass


def test_resuming_leaves_a_file_of_somebody_else_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("one\ntwo without an end")

    with pytest.raises(RowsRefusedError), data_file.resume(path, HEAD):
        pass

    assert path.read_text() == "one\ntwo without an end"


def test_resuming_what_was_never_begun_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RowsRefusedError, match="without --resume"), data_file.resume(tmp_path / "none.jsonl", HEAD):
        pass


@pytest.mark.parametrize(
    ("message", "mib"),
    [
        ("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 9.50 GiB", 2048.0),
        ("CUDA out of memory. Tried to allocate 20.00 MiB.", 20.0),
        ("CUDA error: out of memory", None),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", None),
    ],
)
def test_a_full_card_is_recognized_with_what_was_asked_in_vain(message: str, mib: float | None) -> None:
    assert card_was_full(message)
    assert tried_mib(message) == mib


def test_other_errors_are_no_full_card() -> None:
    assert not card_was_full("CUDA error: an illegal memory access was encountered")
