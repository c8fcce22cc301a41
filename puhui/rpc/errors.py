"""How a refusal travels: a canonical gRPC code, a machine-readable reason and a sentence.

    raise Refusal(grpc.StatusCode.NOT_FOUND, "JOB_NOT_FOUND", "no job j-abc; see `puhui ps`", job_id="j-abc")

A servicer raises `Refusal`; the server's interceptor turns it into a google.rpc.Status whose details
hold an ErrorInfo with domain "puhui". A client turns it back with `Refusal.of`.
"""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf import any_pb2
from google.protobuf.duration_pb2 import Duration
from google.rpc import code_pb2, error_details_pb2, status_pb2

__all__ = ["DOMAIN", "Refusal", "unimplemented"]

DOMAIN = "puhui"
"""Domain of every ErrorInfo."""

_UNKNOWN_REASON = "UNKNOWN"
_MOST_MESSAGE = 1000  # bytes
_MOST_VALUE = 200


class Refusal(Exception):  # noqa: N818 - it is an answer, not a fault
    """A request was refused, or could not be carried out.

    Attributes:
        code: canonical gRPC status code.
        reason: machine-readable reason, UPPER_SNAKE, at most 63 characters.
        message: a sentence that says what is wrong and what to do.
        metadata: facts for machines; keys are snake_case.
        retry_after_s: seconds after which trying again makes sense; None when it does not.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        reason: str,
        message: str,
        *,
        retry_after_s: float | None = None,
        **metadata: str,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = message
        self.metadata = metadata
        self.retry_after_s = retry_after_s

    def __repr__(self) -> str:
        return f"Refusal({self.code.name}, {self.reason}, {self.message!r})"

    def status(self) -> status_pb2.Status:
        """Returns the google.rpc.Status that carries this refusal."""
        # All of it travels in HTTP/2 trailers, of which peers take 8 KiB.
        message = _shortened(self.message, _MOST_MESSAGE)
        metadata = {key: _shortened(value, _MOST_VALUE) for key, value in self.metadata.items()}
        info = error_details_pb2.ErrorInfo(reason=self.reason, domain=DOMAIN, metadata=metadata)
        details = [any_pb2.Any()]
        details[0].Pack(info)
        if self.retry_after_s is not None:
            delay = Duration()
            delay.FromMilliseconds(int(self.retry_after_s * 1000))
            details.append(any_pb2.Any())
            details[1].Pack(error_details_pb2.RetryInfo(retry_delay=delay))
        return status_pb2.Status(code=code_pb2.Code.Value(self.code.name), message=message, details=details)

    @classmethod
    def of(cls, error: grpc.RpcError) -> Refusal:
        """Reads a refusal from what a failed call raised.

        An error without an ErrorInfo of ours (a server that cannot be reached, say) comes back with
        reason "UNKNOWN" and the code and text that gRPC gave.
        """
        # Both kinds of client raise an RpcError that is also a call; gRPC declares that nowhere.
        call: Any = error
        code: grpc.StatusCode = call.code() if hasattr(call, "code") else grpc.StatusCode.UNKNOWN
        text: str = (call.details() if hasattr(call, "details") else str(error)) or ""
        refusal = cls(code, _UNKNOWN_REASON, text)
        status = _status_of(call)
        for detail in status.details if status is not None else ():
            info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
            if detail.Unpack(info) and info.domain == DOMAIN:
                refusal.reason, refusal.metadata = info.reason, dict(info.metadata)
            elif detail.Unpack(retry):
                refusal.retry_after_s = retry.retry_delay.ToMilliseconds() / 1000
        return refusal


def _shortened(text: str, most: int) -> str:
    # Text from a file name may hold what no protobuf string may.
    data = text.encode(errors="replace")
    return data.decode() if len(data) <= most else data[: most - 3].decode(errors="ignore") + "…"


def _status_of(call: Any) -> status_pb2.Status | None:
    trailing = call.trailing_metadata() if hasattr(call, "trailing_metadata") else None
    for key, value in trailing or ():
        if key == "grpc-status-details-bin":
            return status_pb2.Status.FromString(value)
    return None


def unimplemented(rpc: str) -> Refusal:
    """Returns the refusal of an RPC that this version has in its contract but does not serve."""
    return Refusal(
        grpc.StatusCode.UNIMPLEMENTED,
        "RPC_NOT_IMPLEMENTED",
        f"{rpc} is part of the contract, but this version of Puhui does not serve it yet; "
        "see CHANGELOG.md for what each version serves",
        rpc=rpc,
    )
