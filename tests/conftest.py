"""What all tests share: few threads, no network libraries phoning home, and the table of running times at the end."""

from __future__ import annotations

import os

# two test processes run beside each other on as few as two cores; set before torch is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")


def pytest_terminal_summary(terminalreporter):
    """Print what tests recorded as `record_property("seconds", …)`, `"bytes"` and so on: measured, not asserted."""
    rows = [
        (report.nodeid.split("::")[-1], dict(report.user_properties))
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", None) == "call" and getattr(report, "user_properties", None)
    ]
    if rows:
        terminalreporter.section("measured")
        for name, values in sorted(rows):
            terminalreporter.line(f"{name}: " + ", ".join(f"{key} {value}" for key, value in values.items()))
