"""Fixtures that every room's tests use."""

from __future__ import annotations

import os
import signal

# A suite started in the background inherits an ignored Ctrl-C, and so would every command that it tests.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Trainers of TRL report their use to a hub unless told otherwise; tests must not even try.
os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")
