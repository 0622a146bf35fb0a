"""What an export would make, before anything is written: sizes, disk, and which laptop can run it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Group
from rich.table import Table

from quantize import sizes
from quantize.export import Options, disk_needed, refuse_early, within_reach
from quantize.metadata import draft, size_label
from quantize.prepare import prepare
from quantize.source import open_source
from quantize.study import merge_method


@dataclass(frozen=True)
class Forecast:
    """Bytes of every file by type, free disk needed meanwhile, and the memory each file needs in use."""

    name: str
    parameters: int
    merge: str | None
    files: dict[str, int]
    disk: int
    needs: list[sizes.Need]

    def record(self) -> dict[str, Any]:
        """As one JSON object; bytes."""
        return {
            "name": self.name,
            "parameters": self.parameters,
            "merge": self.merge,
            "files": self.files,
            "disk_needed": self.disk,
            "memory": [
                {"quant": n.quant, "context": n.context, "f16_cache": n.total, "q8_0_cache": n.total_q8_0}
                for n in self.needs
            ],
        }

    def table(self) -> Group:
        """For a person."""
        table = Table()
        table.add_column("type")
        table.add_column("file", justify="right")
        for quant, nbytes in self.files.items():
            table.add_row(quant, f"{nbytes / 2**20:,.1f} MiB")
        merge = f", merged by {self.merge}" if self.merge else ""
        head = f"{self.name}: {size_label(self.parameters)} parameters{merge}"
        disk = f"Free disk needed while exporting: {self.disk / 2**30:.2f} GiB. Nothing was written.\n"
        return Group(head, table, disk, sizes.fit_table(self.needs))


def forecast(options: Options) -> Forecast:
    """Reads headers and configuration only. Sizes leave out the figures of a merge, a few kilobytes of metadata.

    Raises BadInput for what the export itself would refuse early.
    """
    prepared = prepare(open_source(options.source, options.adapter, options.calibration), options.name)
    options = within_reach(options, prepared)
    method = merge_method(prepared, options.merge, options.rank)
    refuse_early(options, method, prepared)
    model = draft(prepared, method)
    matrix = options.importance != "off"
    files = {
        quant: sizes.file_bytes(model, quant, imatrix=matrix, overrides=options.tensor_types)
        for quant in options.quants
    }
    return Forecast(
        prepared.name,
        prepared.parameters,
        method,
        files,
        disk_needed(options, prepared, model),
        sizes.needs(model, files),
    )
