"""The command `accelkit`: `main(arguments) -> exit code`; one file a subcommand."""

from __future__ import annotations

from accelkit.cli.main import main as main
