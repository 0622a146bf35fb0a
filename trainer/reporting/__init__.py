"""The parts of a run's report.md: tables and plots."""
