"""No job runs twice at a time, no attempt runs twice, and no result that was finished within its lease is lost.

A hypothesis state machine over clocks that drift and are set, delays of hours, losses, duplicates, cuts, crashes and
reboots. `test_broken.py` shows that it sees what it must.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

from tests.contract.leases.machine import LeaseMachine

EXAMPLES = int(os.environ.get("PUHUI_LEASE_EXAMPLES", "1000"))

TestLeases = LeaseMachine.TestCase
TestLeases.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
