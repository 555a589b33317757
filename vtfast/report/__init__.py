"""Everything that shows a run: metrics files and trackers, a table in the terminal, curves.png and the report page.

Start reading at `page.py`, which builds the page from a run folder; `tracking.py` writes the files that it reads.
"""

from vtfast.report.curves import draw_curves, held_out_table
from vtfast.report.page import write_report
from vtfast.report.read_run import save_held_out

__all__ = ["draw_curves", "held_out_table", "save_held_out", "write_report"]
