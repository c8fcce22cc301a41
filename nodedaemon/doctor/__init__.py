"""What works on this host, and what to do about the rest.

Every check is a pure function of facts; gathering the facts is apart from it, and changes nothing on the host.
"""

from nodedaemon.doctor.examination import Asked, Report, Section, examine
from nodedaemon.doctor.findings import Ability, Finding, Level, Verdict
from nodedaemon.doctor.report import as_json, print_table

__all__ = [
    "Ability",
    "Asked",
    "Finding",
    "Level",
    "Report",
    "Section",
    "Verdict",
    "as_json",
    "examine",
    "print_table",
]
