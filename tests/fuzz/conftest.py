"""Counts of fuzzed cases: a few thousand in the suite, PETOOL_LITE_FUZZ times as many in `make fuzz`."""

from support_fuzz import COUNTS, FACTOR


def pytest_terminal_summary(terminalreporter) -> None:
    if FACTOR > 1:
        for name, count in sorted(COUNTS.items()):
            terminalreporter.write_line(f"{count:>9,} cases  {name}")
        terminalreporter.write_line(f"{sum(COUNTS.values()):>9,} cases  in all")
