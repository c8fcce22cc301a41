"""What is agreed with a peer, in words."""

from __future__ import annotations

import re

from puhui.cli.words import size
from puhui.v1.peer_service_pb2 import PeerTerms

__all__ = ["agreed"]

_STRETCH = re.compile(r"0?(\d{1,2}:\d{2})\s*-\s*0?(\d{1,2}:\d{2})")


def agreed(terms: PeerTerms) -> list[str]:
    """Returns every term that is not the usual, in a few words each."""
    numbers = (
        (terms.most_sent, f"at most {terms.most_sent} of our jobs there"),
        (terms.most_received, f"at most {terms.most_received} of its jobs here"),
        (terms.weight, f"weight {terms.weight:g}"),
        (terms.cost, f"cost {terms.cost:g}"),
        (terms.distance, f"distance {terms.distance:g}"),
        (terms.highest_priority, f"its jobs have at most priority {terms.highest_priority}"),
        (terms.most_bundle_bytes, f"bundles of at most {size(terms.most_bundle_bytes)}"),
        (terms.most_bytes_a_day, f"at most {size(terms.most_bytes_a_day)} a day"),
        (terms.most_result_bytes, f"results of at most {size(terms.most_result_bytes)}"),
        (terms.most_calls_a_second, f"at most {terms.most_calls_a_second} calls a second"),
    )
    flags = (
        (terms.send_off, "nothing is sent"),
        (terms.receive_off, "nothing is taken"),
        (terms.transit, "may be passed on"),
        (terms.tenants, f"tenants {', '.join(terms.tenants)}"),
        (terms.hours, f"its work is taken {_hours(terms.hours)}"),
    )
    said = [text for holds, text in flags if holds]
    said += [f"our {ours} is their {theirs}" for ours, theirs in sorted(terms.tenants_out.items())]
    said += [f"their {theirs} is our {ours}" for theirs, ours in sorted(terms.tenants_in.items())]
    said += [text for number, text in numbers if number]
    return said + [f"{key}={value}" for key, value in sorted(terms.labels.items())]


def _hours(text: str) -> str:
    """Returns hours as they were written; what ends when it begins could be nothing, and is a day."""
    return _STRETCH.sub(lambda match: match[0] + (" (24 hours)" if match[1] == match[2] else ""), text)
