import json

import pytest

from predictor_onnx import catalog
from predictor_onnx.measure.plan import ListRefusedError, Planned, plan, read_list

CARD_MIB = 40_960.0


@pytest.fixture(scope="module")
def planned() -> list[Planned]:
    return plan(catalog.load(), CARD_MIB, seed=20)


def test_the_same_seed_gives_the_same_plan_and_another_another(planned: list[Planned]) -> None:
    assert plan(catalog.load(), CARD_MIB, seed=20) == planned
    assert plan(catalog.load(), CARD_MIB, seed=21) != planned


def test_no_configuration_is_planned_twice(planned: list[Planned]) -> None:
    assert len({one.configuration for one in planned}) == len(planned)


def test_each_new_family_comes_before_a_second_look_at_a_known_one_of_the_same_cost(planned: list[Planned]) -> None:
    first = planned[:100]

    assert len({one.family for one in first}) > 90
    assert max(one.expected_s for one in first) < 20


def test_early_rows_spread_over_ways_to_compute(planned: list[Planned]) -> None:
    first = [one.configuration for one in planned[:60]]

    assert {one.precision.value for one in first} >= {"float32", "tf32", "amp-float16", "amp-bfloat16", "bfloat16"}
    assert {one.optimizer for one in first} >= {"adam", "adamw", "sgd", ""}
    assert {one.training for one in first} == {True, False}
    assert any(one.channels_last for one in first)
    assert any(one.checkpointing for one in first)
    assert any(one.attention == "eager" for one in first)
    assert any(one.accumulation > 1 for one in first)
    assert len({one.batch for one in first}) >= 6


def test_all_sources_are_in_it(planned: list[Planned]) -> None:
    assert {one.configuration.source for one in planned} == {"timm", "torchvision", "transformers", "layers"}


def test_what_is_far_beyond_the_card_is_left_out_and_what_may_just_not_fit_is_kept() -> None:
    entry = {"params": 10e6, "saved": 20e6, "macs": 1e9, "input": [3, 224, 224], "classes": 1000}
    known = {"timm/wide_one": entry, "timm/vast_one": {**entry, "params": 1e9}}

    found = [one.configuration for one in plan(known, 8_000.0, seed=1) if one.configuration.source == "timm"]

    assert {one.model for one in found} == {"wide_one"}
    # 160 MB of state and 80 MB a sample: 64 fit, 128 do not quite, 256 are hopeless.
    assert max(one.batch for one in found if one.training) == 128


def test_networks_that_give_no_classes_to_one_image_are_left_out() -> None:
    entry = {"params": 1e6, "saved": 1e6, "macs": 1e8, "input": [3, 224, 224], "classes": 1000}
    known = {
        "timm/features_only": {**entry, "classes": 0},
        "torchvision/film": {**entry, "input": [3, 16, 112, 112]},
        "torchvision/map": {**entry, "input": [3, 520, 520]},
    }

    assert {one.configuration.source for one in plan(known, CARD_MIB, seed=1)} == {"layers"}


def test_a_list_keeps_its_order_and_may_have_comments() -> None:
    lines = [
        "# what I care for",
        json.dumps({"source": "timm", "model": "resnet18", "batch": 8, "shape": [3, 224, 224]}),
        "",
        json.dumps({"source": "transformers", "model": "EleutherAI/pythia-70m", "batch": 2, "shape": [64]}),
        json.dumps({"source": "layers", "model": '[["Linear", 4, 2]]', "batch": 2, "shape": [4], "classes": 2}),
    ]

    assert [(one.family, one.configuration.batch) for one in read_list(lines)] == [
        ("resnet", 8), ("pythia", 2), ("layers", 2),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"source": "timm"}', '{"source": 1, "model": "a", "batch": 1, "shape": [1]}']
)
def test_a_line_that_is_no_configuration_is_named(line: str) -> None:
    with pytest.raises(ListRefusedError, match="line 2: "):
        read_list(["# one", line])
