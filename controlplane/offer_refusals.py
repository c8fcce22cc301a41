"""Why a peer makes no offer: the codes that travel, and what each means, for people. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

__all__ = ["REFUSALS", "UNANSWERED", "OfferRefusal", "refused_clause", "unanswered_clause"]


class OfferRefusal(StrEnum):
    """`GetOfferResponse.reason`, as this version gives it."""

    BUNDLE_TOO_LARGE = "BUNDLE_TOO_LARGE"
    BUSY = "BUSY"
    DRAINING = "DRAINING"
    FULL = "FULL"
    LABELS_DIFFER = "LABELS_DIFFER"
    LOOP = "LOOP"
    NO_GPUS = "NO_GPUS"
    NOT_RECEIVING = "NOT_RECEIVING"
    OUT_OF_HOURS = "OUT_OF_HOURS"
    PROFILE_NOT_AVAILABLE = "PROFILE_NOT_AVAILABLE"
    TOO_LARGE = "TOO_LARGE"
    TOO_MANY_GUESTS = "TOO_MANY_GUESTS"
    TOO_MANY_OFFERS = "TOO_MANY_OFFERS"


REFUSALS: Mapping[str, str] = {
    OfferRefusal.BUNDLE_TOO_LARGE: "takes no code from this centre that is as large as this job's",
    OfferRefusal.BUSY: "is asked for more offers than it can work out",
    OfferRefusal.DRAINING: "takes no work now on its nodes that could run it",
    OfferRefusal.FULL: "has no room for it within a day, or does not know when",
    OfferRefusal.LABELS_DIFFER: "has other labels than the job requires",
    OfferRefusal.LOOP: "has had this job before",
    OfferRefusal.NO_GPUS: "has no GPU that can be cut now",
    OfferRefusal.NOT_RECEIVING: "takes no work from this centre",
    OfferRefusal.OUT_OF_HOURS: "takes no work from this centre at this hour",
    OfferRefusal.PROFILE_NOT_AVAILABLE: "has no slice of the profile that it asks for",
    OfferRefusal.TOO_LARGE: "has no slice with as much memory as it needs",
    OfferRefusal.TOO_MANY_GUESTS: "has as many jobs of this centre as it takes at once",
    OfferRefusal.TOO_MANY_OFFERS: "has promised this centre as much as it does at once",
}
"""What a refusal means, as the rest of a sentence about the peer and a job. The peer's own words are its own matter:
they are about limits that its operator set, and anything may be in them."""

UNANSWERED: Mapping[str, str] = {
    "CERTIFICATE_MISSING": "was shown no certificate of this centre",
    "PEER_NOT_CALLED": "only sends work, and cannot be asked",
    "PEER_RATE": "is called by this centre more often than was agreed",
    "PEER_UNKNOWN": "knows this centre as its peer no longer; its operator would have to invite this one again",
    "UNKNOWN": "could not be reached, or was too slow to answer",
}
"""The same for the reasons with which the call itself fails; UNKNOWN is what comes from gRPC, and not from a peer."""


def refused_clause(peer: str, reason: str) -> str:
    """Returns what it means that a peer refused, "b takes no work from this centre (NOT_RECEIVING)"."""
    return f"{peer} {REFUSALS.get(reason, 'makes no offer, for a reason that this version does not know')} ({reason})"


def unanswered_clause(peer: str, reason: str) -> str:
    """Returns what it means that a peer gave no answer to be used; its reason is a code, or words of this centre's."""
    known = UNANSWERED.get(reason)
    return f"{peer} {known} ({reason})" if known is not None else f"{peer} did not answer: {reason}"
