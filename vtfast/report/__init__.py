"""What a person looks at after a run: a table in the terminal, a picture, and a page with everything."""

from vtfast.report.curves import draw_curves, held_out_table
from vtfast.report.page import write_report
from vtfast.report.run_folder import save_held_out

__all__ = ["draw_curves", "held_out_table", "save_held_out", "write_report"]
