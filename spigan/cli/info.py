"""`spigan info`."""

from __future__ import annotations

from spigan.cli.options import AsJson


def info(as_json: AsJson = False) -> None:
    """Show versions, devices and backends.

    Also shows which backend each operation would use, and why. Include the output in bug reports.
    """
    from spigan.info import main as print_info

    print_info(as_json)
