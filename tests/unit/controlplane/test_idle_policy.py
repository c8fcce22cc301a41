"""When an unused share may be taken back: the job's word, its tenant's, the centre's."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.idle_policy import (
    CentrePolicy,
    TenantPolicy,
    TenantsFileError,
    read_tenants,
    resolve,
    sampling_interval_s,
    watch_of,
)
from puhui.rpc.errors import Refusal
from puhui.rpc.moment import duration, seconds
from puhui.v1 import job_pb2

SESSION = job_pb2.JOB_KIND_SESSION
CENTRE = CentrePolicy(tenants={"lab": TenantPolicy(120.0, 3.0, 0.0, job_pb2.RECLAIM_MODE_DETACH, 5.0)})


def resolved(
    kind: job_pb2.JobKind.ValueType = job_pb2.JOB_KIND_BATCH,
    tenant: str = "default",
    centre: CentrePolicy = CENTRE,
    **idle: Any,
) -> job_pb2.IdlePolicy:
    policy = job_pb2.IdlePolicy(**idle)
    return resolve(job_pb2.JobSpec(kind=kind, tenant=tenant, idle=policy), centre)


def refusal(centre: CentrePolicy = CENTRE, **idle: Any) -> Refusal:
    with pytest.raises(Refusal) as caught:
        resolved(centre=centre, **idle)
    return caught.value


def test_what_a_job_does_not_say_its_tenant_or_the_centre_says() -> None:
    batch, session, lab = resolved(), resolved(SESSION), resolved(tenant="lab")
    assert (seconds(batch.idle_after), seconds(session.idle_after), seconds(lab.idle_after)) == (900, 300, 120)
    assert (batch.idle_below_percent, lab.idle_below_percent) == (1, 3)
    assert (seconds(batch.start_grace), seconds(lab.start_grace)) == (600, 0)
    assert lab.HasField("start_grace")
    assert (batch.reclaim_mode, lab.reclaim_mode) == (0, job_pb2.RECLAIM_MODE_DETACH)
    own = resolved(tenant="lab", idle_after=duration(60), reclaim_mode=job_pb2.RECLAIM_MODE_STOP, warn_signal=True)
    assert (seconds(own.idle_after), own.reclaim_mode, own.warn_signal) == (60, job_pb2.RECLAIM_MODE_STOP, True)
    assert (CENTRE.warm_for("lab"), CENTRE.warm_for("default")) == (5, 60)
    assert watch_of(own).idle_after == own.idle_after


def test_a_default_is_never_longer_than_the_centre_allows() -> None:
    assert seconds(resolved(centre=CentrePolicy(longest_idle_after_s=60, start_grace_s=30)).idle_after) == 60


@pytest.mark.parametrize("after_s", [0.0, 0.1, 0.29, -1.0])
def test_an_idle_after_shorter_than_three_samples_is_refused_with_the_shortest(after_s: float) -> None:
    refused = refusal(idle_after=duration(after_s))
    assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "IDLE_AFTER_TOO_SHORT")
    assert refused.metadata["shortest_s"] == "0.3"
    assert "0.3 s" in refused.message


def test_an_idle_after_beyond_the_longest_is_refused_with_the_longest() -> None:
    refused = refusal(idle_after=duration(86401))
    assert (refused.reason, refused.metadata["longest_s"]) == ("IDLE_AFTER_TOO_LONG", "86400")


@pytest.mark.parametrize(
    "idle",
    [
        {"idle_below_percent": float("nan")},
        {"idle_below_percent": -1.0},
        {"idle_below_percent": 100.1},
        {"start_grace": duration(-1)},
        {"start_grace": duration(90000)},
        {"reclaim_mode": 99},
        {"on_reclaim": [""]},
        {"on_reclaim": ["a\0b"]},
        {"on_reclaim": ["x"] * 65},
        {"on_reclaim": ["x" * 5000]},
        {"on_reclaim": ["x"], "on_reclaim_limit": duration(0)},
        {"on_reclaim": ["x"], "on_reclaim_limit": duration(301)},
    ],
)
def test_what_cannot_be_meant_is_refused_by_its_field(idle: dict[str, Any]) -> None:
    refused = refusal(**idle)
    assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "SPEC_INVALID")
    assert refused.metadata["field"].startswith("idle.")


def test_never_is_the_centres_to_allow() -> None:
    never = job_pb2.RECLAIM_MODE_NEVER
    assert resolved(reclaim_mode=never).reclaim_mode == never
    assert refusal(CentrePolicy(never_allowed=False), reclaim_mode=never).reason == "NEVER_NOT_ALLOWED"


def test_a_command_before_reclaim_has_a_limit() -> None:
    assert seconds(resolved(on_reclaim=["save"]).on_reclaim_limit) == 10
    assert seconds(resolved(on_reclaim=["save"], on_reclaim_limit=duration(30)).on_reclaim_limit) == 30
    assert not resolved().HasField("on_reclaim_limit")


@given(st.floats(0.3, 86400), st.sampled_from([job_pb2.JOB_KIND_BATCH, SESSION]))
def test_what_is_resolved_holds_three_samples_and_resolves_to_itself(
    after_s: float, kind: job_pb2.JobKind.ValueType
) -> None:
    policy = resolved(kind, idle_after=duration(after_s))
    assert seconds(policy.idle_after) >= 3 * sampling_interval_s(seconds(policy.idle_after)) - 1e-6
    assert resolve(job_pb2.JobSpec(kind=kind, idle=policy), CENTRE) == policy


def test_tenants_are_read_from_a_file() -> None:
    text = (
        '[tenants.lab]\nidle_after = "2m"\nidle_below = "3%"\nstart_grace = "0s"\nreclaim = "detach"\nwarm_for = "5s"\n'
    )
    assert read_tenants(text) == dict(CENTRE.tenants)
    assert read_tenants("") == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[tenants.lab", "no TOML"),
        ("[other]", "'other'"),
        ("tenants = 3", "holds a table"),
        ("[tenants]\nlab = 3", "tenants.lab is no table"),
        ("[tenants.lab]\nidle = 3", "tenants.lab.idle is unknown"),
        ("[tenants.lab]\nidle_after = 3", "tenants.lab.idle_after: 3"),
        ('[tenants.lab]\nidle_after = "100ms"', "shorter than three samples"),
        ('[tenants.lab]\nreclaim = "maybe"', "tenants.lab.reclaim: 'maybe'"),
        ("[tenants.lab]\nreclaim = []", "tenants.lab.reclaim"),
        ('[tenants.lab]\nidle_below = "200%"', "tenants.lab.idle_below"),
    ],
)
def test_a_file_of_tenants_that_is_wrong_is_refused_by_its_key(text: str, said: str) -> None:
    with pytest.raises(TenantsFileError, match=r"\S") as caught:
        read_tenants(text)
    assert said in str(caught.value)
